"""Checkpoints of pre-training: CoreNet's files, interruption and resumption."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from models import TEXT
from places import ROOT, SUPPORT
from pretrainings import (
    read_losses,
    small_recipe,
    streamed_data,
)

torch = pytest.importorskip("torch", reason="needs PyTorch")

from converters.formats.sources import open_source  # noqa: E402
from converters.pretraining.checkpoints import (  # noqa: E402
    AVERAGE,
    LAST,
    STATE,
    WEIGHTS,
    average_checkpoints,
    files_on_disk,
)
from converters.pretraining.log import Saved, Trained  # noqa: E402
from converters.pretraining.run import pretrain  # noqa: E402
from mlx_openelm.config import OpenELMConfig  # noqa: E402
from mlx_openelm.errors import OpenELMError  # noqa: E402


@pytest.fixture
def recipe(tmp_path):
    return replace(small_recipe(tmp_path), eval_every=100)


def weights_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_convert_reads_each_of_its_files(recipe):
    average = pretrain(recipe)
    run = Path(recipe.output)
    assert list(files_on_disk(run, WEIGHTS)) == [4, 8, 12]
    assert average == run / AVERAGE
    state = weights_of(run / LAST)
    assert (state["iterations"], state["epoch"]) == (12, 0)
    assert state["is_interval_ckpt"] is True
    config = OpenELMConfig.from_file(run / "config.json")
    for path in (average, run / LAST, files_on_disk(run, WEIGHTS)[4]):
        source = open_source(str(path))
        assert source.config == config
        assert list(source.tensors) == list(config.tensor_shapes())
    assert same(state["model_state_dict"], weights_of(files_on_disk(run, WEIGHTS)[12]))


def test_spare_rows_are_written_and_removed_by_convert(recipe, tmp_path):
    from converters.conversion.run import convert

    recipe = replace(recipe, steps=1, model=replace(recipe.model, spare_rows=True))
    path = pretrain(recipe)
    assert len(weights_of(path)["token_embeddings.weight"]) == 384  # of 300 pieces
    report = convert([str(path)], tmp_path / "mlx", receipt=False)
    assert (report.path / "tokenizer.model").is_file()
    assert OpenELMConfig.from_file(report.path / "config.json").vocab_size == 300


def test_keep_last_and_keep_every_select_the_checkpoints(recipe):
    recipe = replace(recipe, save_every=1, keep_last=2, keep_every=5, keep_states=3)
    run = Path(recipe.output)
    pretrain(recipe)
    assert list(files_on_disk(run, WEIGHTS)) == [5, 10, 11, 12]
    assert list(files_on_disk(run, STATE)) == [10, 11, 12]
    assert len(list(run.glob("*.sha256"))) == 4 + 3 + 2  # and none without its file
    every = replace(recipe, keep_states=None, output=recipe.output + "-every")
    pretrain(every)
    assert list(files_on_disk(Path(every.output), STATE)) == list(range(1, 13))


def test_averaging_is_done_in_float64(tmp_path):
    paths = []
    for i, value in enumerate((1.0, 2.0, 4.0)):
        paths.append(tmp_path / f"{i}.pt")
        torch.save({"w": torch.full((2,), value, dtype=torch.bfloat16)}, paths[-1])
    average = average_checkpoints(paths)
    assert average["w"].dtype == torch.bfloat16
    assert torch.equal(
        average["w"], torch.full((2,), 7 / 3, dtype=torch.float64).bfloat16()
    )


@pytest.mark.parametrize("kind", ["adamw", "muon", "streamed"])
@pytest.mark.parametrize("at", [4, 9])  # the second between two checkpoints
def test_an_interrupted_run_resumes_bit_for_bit(recipe, tmp_path, kind, at):
    if kind == "streamed":
        recipe = replace(recipe, data=streamed_data(tmp_path))
    else:
        optimizer = replace(recipe.optimizer, name=kind)
        recipe = replace(recipe, optimizer=optimizer, report_every=3)
    whole = replace(recipe, output=str(tmp_path / "whole"))
    pretrain(whole)

    def interrupt(event):
        if isinstance(event, Saved) and event.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    if at == 9:
        recipe = replace(recipe, save_every=11, average_last=1)
        whole = replace(recipe, output=str(tmp_path / "other"))
        pretrain(whole)

        def interrupt(event):
            if isinstance(event, Trained) and event.step >= 9:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, on_event=interrupt)
    assert weights_of(Path(recipe.output) / LAST)["iterations"] == at
    resumed = pretrain(recipe, resume=True)
    assert same(weights_of(resumed), weights_of(Path(whole.output) / AVERAGE))
    assert read_losses(recipe.output) == read_losses(whole.output)


def test_sigterm_saves_and_exits_with_143(recipe):
    def terminate(event):
        if isinstance(event, Trained) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        pretrain(recipe, on_event=terminate)
    assert stopped.value.code == 143
    run = Path(recipe.output)
    assert weights_of(run / LAST)["iterations"] == 3
    assert weights_of(run / LAST)["is_interval_ckpt"] is False
    assert not files_on_disk(run, WEIGHTS)  # it would be averaged


# Kills ---------------------------------------------------------------------------


@pytest.mark.proof
def test_a_run_killed_before_any_disk_operation_can_resume(tmp_path):
    done = subprocess.run(
        [sys.executable, SUPPORT / "killing_pretraining.py", tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


# Errors --------------------------------------------------------------------------


def test_runs_are_not_overwritten_or_resumed_with_another_recipe(recipe):
    with pytest.raises(OpenELMError, match="nothing to resume"):
        pretrain(recipe, resume=True)
    pretrain(replace(recipe, steps=4))
    with pytest.raises(OpenELMError, match="`resume`"):
        pretrain(recipe)
    with pytest.raises(OpenELMError, match="steps: 4 -> 12"):
        pretrain(recipe, resume=True)
    wider = replace(recipe.model, model_dim=64)
    with pytest.raises(OpenELMError, match=r"\(model\.model_dim: 32 -> 64\)"):
        pretrain(replace(recipe, steps=4, model=wider), resume=True)
    pretrain(replace(recipe, steps=4, micro_batch_size=2, save_every=3), resume=True)


def test_a_folder_is_locked_by_its_run(recipe):
    """As when processes outlive a killed torchrun."""
    recipe = replace(recipe, steps=4)
    refused = []

    def start_another(event):
        if isinstance(event, Saved):
            with pytest.raises(OpenELMError, match="Another process is training"):
                pretrain(recipe, resume=True)
            refused.append(event.step)

    pretrain(recipe, on_event=start_another)
    assert refused == [4]
    pretrain(recipe, resume=True)
    taken = replace(recipe, output=recipe.data.train[0])
    with pytest.raises(OpenELMError, match=r"Cannot create the folder .*train\.txt"):
        pretrain(taken)


def test_a_run_does_not_resume_with_other_text(recipe):
    pretrain(replace(recipe, steps=4))
    Path(recipe.data.train[0]).write_text(TEXT * 3)
    with pytest.raises(OpenELMError, match=r"train\.txt|corpus|data"):
        pretrain(replace(recipe, steps=4), resume=True)


def test_a_damaged_run_is_refused(recipe):
    recipe = replace(recipe, steps=4)
    pretrain(recipe)
    last = Path(recipe.output) / LAST
    whole = last.read_bytes()
    last.with_name("other.pt").write_bytes(whole)
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OpenELMError, match="damaged"):
        pretrain(recipe, resume=True)
    last.with_name(LAST + ".sha256").unlink()
    torch.save({"model_state_dict": {}}, last)
    with pytest.raises(OpenELMError, match="has no position to resume from"):
        pretrain(recipe, resume=True)
    torch.save(torch.load(last.with_name("other.pt")) | {"model_state_dict": {}}, last)
    with pytest.raises(OpenELMError, match=r"optimizer state in .* do not fit"):
        pretrain(recipe, resume=True)
    last.write_bytes(whole)
    (last.parent / "checkpoint_epoch_0_iter_4.pt").rename(
        last.parent / "checkpoint_epoch_0_iter_best.pt"
    )
    average = (last.parent / AVERAGE).read_bytes()
    with pytest.raises(OpenELMError, match=r"no checkpoint_epoch_0_iter_N\.pt to"):
        pretrain(recipe, resume=True)
    assert (last.parent / AVERAGE).read_bytes() == average
    (Path(recipe.output) / "recipe.json").unlink()
    with pytest.raises(OpenELMError, match=r"recipe\.json"):
        pretrain(recipe, resume=True)


# Initial weights -----------------------------------------------------------------


@pytest.mark.parametrize("head", [None, "lm_head.weight", "classifier.weight"])
def test_a_run_starts_from_initial_weights(recipe, tmp_path, head):
    from converters.reference import ReferenceOpenELM

    initial = tmp_path / "initial"
    pretrain(replace(recipe, steps=1, output=str(initial)))
    if head is not None:
        config = OpenELMConfig.from_file(initial / "config.json")
        config = replace(config, share_input_output_layers=False)
        state = ReferenceOpenELM(config).state_dict()
        state[head] = state.pop("lm_head.weight")
        torch.save(state, initial / AVERAGE)
        (initial / "config.json").write_text(json.dumps(config.to_dict()))
    before = weights_of(initial / AVERAGE)
    recipe = replace(
        recipe,
        model=type(recipe.model)(),
        init=str(initial / AVERAGE),
        steps=1,
        optimizer=replace(recipe.optimizer, warmup_learning_rate=0.0),
    )
    pretrain(recipe)  # one step with learning rate 0
    after = weights_of(Path(recipe.output) / AVERAGE)
    assert len(after) == len(before)
    for name, tensor in before.items():
        ours = "lm_head.weight" if name == head else name
        assert torch.equal(after[ours], tensor)
    kept, source = (p / "tokenizer.model" for p in (Path(recipe.output), initial))
    assert kept.read_bytes() == source.read_bytes()
    last = open_source(str(Path(recipe.output) / LAST))
    assert last.config.share_input_output_layers == (head is None)
    model = replace(small_recipe(tmp_path).model, num_layers=3)
    with pytest.raises(OpenELMError, match="does not agree with the initial weights"):
        pretrain(replace(recipe, model=model, output=str(tmp_path / "other")))
    other = replace(recipe, output=str(tmp_path / "other"))
    for wrong, message in (
        ({name: tensor.to(torch.int8) for name, tensor in before.items()}, "int8"),
        ({"model_state_dict": None}, "no weights by name"),
        (dict(enumerate(before.values())), "no weights by name"),
    ):
        torch.save(wrong, initial / AVERAGE)
        with pytest.raises(OpenELMError, match=message):
            pretrain(other)
    (initial / "tokenizer.model").unlink()
    torch.save(before, initial / AVERAGE)
    with pytest.raises(OpenELMError, match=r"no tokenizer\.model in"):
        pretrain(other)
    (initial / AVERAGE).unlink()
    pretrain(recipe, resume=True)  # without the initial weights
