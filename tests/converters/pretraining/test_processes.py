"""Training with two processes: DDP and FSDP, interruptions and errors."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from commands import call
from pretrainings import (
    ROOT,
    job,
    read_losses,
    read_metrics,
    run_ranks,
    small_recipe,
    start_ranks,
    streamed_data,
)

torch = pytest.importorskip("torch", reason="needs PyTorch")

from converters.pretraining.checkpoints import (  # noqa: E402
    AVERAGE,
    LAST,
    RECIPE,
    as_json,
)
from converters.pretraining.processes import SharedError  # noqa: E402
from converters.pretraining.run import pretrain  # noqa: E402
from mlx_openelm.errors import OpenELMError  # noqa: E402


class Run(NamedTuple):
    output: str
    messages: tuple[str, str]  # of the two processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def packed(folder):
    """A recipe that one process has run."""
    recipe = replace(small_recipe(folder), batch_size=8, steps=8)
    pretrain(recipe)
    return recipe


@pytest.fixture(scope="module")
def streamed(folder, packed):
    """Another one, of streamed data."""
    output = str(folder / "streamed")
    recipe = replace(packed, data=streamed_data(folder), output=output)
    pretrain(recipe)
    return recipe


def run_all(folder, recipes, jobs=None) -> dict[str, Run]:
    """Run recipes with two processes, in one start; `jobs` changes those of names."""
    recipes = {
        name: replace(recipe, output=str(folder / f"two-{name.replace(' ', '-')}"))
        for name, recipe in recipes.items()
    }
    jobs = [{**job(r), **(jobs or {}).get(name, {})} for name, r in recipes.items()]
    messages = zip(*run_ranks(folder, jobs), strict=True)
    return {
        name: Run(recipe.output, both)
        for (name, recipe), both in zip(recipes.items(), messages, strict=True)
    }


@pytest.fixture(scope="module")
def runs(folder, packed, streamed):
    """Runs without shards: two that train, and three that cannot start."""
    bad = folder / "bad.jsonl"
    bad.write_text('{"text": "whole"}\n{"text": "cut')
    recipes = {
        "accumulated": replace(packed, micro_batch_size=2),
        "streamed": streamed,
        "uneven batch": replace(packed, batch_size=7),
        "damaged": streamed,
        "other text": streamed,
    }
    jobs = {
        "damaged": {"files": {"rank0": str(bad), "rank1": str(bad)}},
        "other text": {"files": {"rank1": str(bad)}},
    }
    return run_all(folder, recipes, jobs)


@pytest.fixture(scope="module")
def sharded(folder, packed):
    """Runs with FSDP; one of them was started by one process."""

    class Cut(Exception):
        pass

    def cut(event):
        if type(event).__name__ == "Saved" and event.step == 4:
            raise Cut

    with pytest.raises(Cut):
        pretrain(replace(packed, output=str(folder / "two-resumed")), on_event=cut)
    fsdp = replace(packed, parallel="fsdp")
    recipes = {
        "plain": fsdp,
        "accumulated": replace(fsdp, micro_batch_size=2, activation_checkpointing=True),
        "bf16": replace(fsdp, bf16=True, steps=3),
        "resumed": fsdp,
    }
    return run_all(folder, recipes, {"resumed": {"resume": True}})


def kill_after_a_checkpoint(folder: Path, recipe) -> None:
    processes = start_ranks(folder, [job(recipe)])
    try:
        deadline = time.monotonic() + 150
        while not (Path(recipe.output) / LAST).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            with process:  # waits for it
                pass


def assert_same_losses(run: Run, alone) -> None:
    assert run.messages == ("done", "done")
    losses = read_losses(run.output)
    assert len(losses) == 8
    assert losses == pytest.approx(read_losses(alone.output), abs=1e-5)


def assert_same_checkpoints(run: Run, alone) -> None:
    one, two = (
        torch.load(Path(output) / LAST, weights_only=True)
        for output in (alone.output, run.output)
    )
    assert list(one) == list(two)
    for key, tensor in one["model_state_dict"].items():
        other = two["model_state_dict"][key]
        assert type(other) is torch.Tensor
        torch.testing.assert_close(other, tensor, atol=1e-4, rtol=0)
    assert one["optim_state_dict"]["state"].keys() == (
        two["optim_state_dict"]["state"].keys()
    )
    scores, expected = (
        [r["bits_per_byte"] for r in read_metrics(output, "evaluated")]
        for output in (run.output, alone.output)
    )
    assert scores == pytest.approx(expected, abs=1e-5)


def test_two_processes_train_as_one(runs, packed, streamed):
    assert_same_losses(runs["streamed"], streamed)
    assert_same_losses(runs["accumulated"], packed)
    assert_same_checkpoints(runs["accumulated"], packed)


@pytest.mark.proof
@pytest.mark.parametrize("name", ["plain", "accumulated", "resumed"])
def test_two_processes_with_shards_train_as_one(sharded, packed, name):
    assert_same_losses(sharded[name], packed)
    assert_same_checkpoints(sharded[name], packed)


@pytest.mark.proof
def test_two_killed_processes_resume(tmp_path):
    recipe = replace(small_recipe(tmp_path), batch_size=8, steps=40, save_every=5)
    recipe = replace(recipe, data=streamed_data(tmp_path))
    whole = replace(recipe, output=str(tmp_path / "never-killed"))
    kill_after_a_checkpoint(tmp_path, recipe)
    jobs = [job(recipe, resume=True), job(whole)]
    assert run_ranks(tmp_path, jobs) == [["done", "done"]] * 2
    assert 5 <= read_metrics(recipe.output, "started")[-1]["first_step"] < 40
    steps = [record["step"] for record in read_metrics(recipe.output)]
    assert steps == list(range(1, 41))
    losses = read_losses(recipe.output)
    assert losses == pytest.approx(read_losses(whole.output), abs=1e-6)


@pytest.mark.proof
def test_shards_compute_in_bf16_and_keep_float32(sharded, packed):
    run = sharded["bf16"]
    assert run.messages == ("done", "done")
    losses, expected = read_losses(run.output), read_losses(packed.output)[:3]
    assert losses == pytest.approx(expected, abs=0.05)
    assert losses != pytest.approx(expected, abs=1e-5)
    state = torch.load(Path(run.output) / LAST, weights_only=True)
    assert {t.dtype for t in state["model_state_dict"].values()} == {torch.float32}


def test_an_error_in_one_process_is_raised_in_all(runs):
    first, second = runs["damaged"].messages
    assert first == second
    assert "bad.jsonl" in first
    assert first.endswith(".")
    assert (
        runs["other text"].messages
        == (
            "Process 1 (1 of 2 in all) would read different text than process 0: files "
            "are missing or differ there; give all of them the same files.",
        )
        * 2
    )
    assert not (Path(runs["other text"].output) / RECIPE).exists()
    assert (
        runs["uneven batch"].messages
        == ("batch_size is 7; it must be a multiple of the number of processes (2).",)
        * 2
    )
    assert not Path(runs["uneven batch"].output).exists()


@pytest.mark.proof
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_processes_have_the_losses_of_one(tmp_path, parallel):
    recipe = replace(small_recipe(tmp_path), steps=4)
    pretrain(recipe)
    compiled = replace(
        recipe, compile=True, parallel=parallel, output=str(tmp_path / "compiled")
    )
    assert run_ranks(tmp_path, [job(compiled)]) == [["done"]] * 2
    assert read_losses(compiled.output) == pytest.approx(
        read_losses(recipe.output), abs=1e-5
    )


def test_muon_with_fsdp_is_refused(tmp_path):
    recipe = replace(small_recipe(tmp_path), parallel="fsdp")
    muon = replace(recipe.optimizer, name="muon")
    with pytest.raises(OpenELMError, match="unsharded matrices"):
        pretrain(replace(recipe, optimizer=muon))


def torchrun(recipe, *options: str, **how) -> list[str]:
    path = Path(recipe.output).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(as_json(recipe)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "mlx_openelm", "pretrain"]
    return [*command, "-c", str(path), *options]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.proof
def test_under_torchrun_only_the_first_process_prints(tmp_path):
    recipe = replace(small_recipe(tmp_path), steps=6)
    alone = replace(recipe, output=str(tmp_path / "alone"))
    pretrain(alone)
    done = subprocess.run(
        torchrun(recipe), env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(Path(recipe.output) / AVERAGE)
    assert done.stderr.count("6 of 6") <= 1
    assert read_losses(recipe.output) == pytest.approx(
        read_losses(alone.output), abs=1e-5
    )


@pytest.mark.proof
def test_under_torchrun_an_error_is_printed_once(tmp_path):
    recipe = small_recipe(tmp_path)
    pretrain(replace(recipe, steps=1))
    refused = subprocess.run(
        torchrun(recipe), env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert refused.returncode == 1
    assert refused.stderr.count("error: ") == 1
    assert "already holds a run" in refused.stderr


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_other_processes_wait_while_the_first_prints_the_error(
    tmp_path, monkeypatch, kind
):
    """Otherwise torchrun would end the first when another has ended."""

    def fail(*args, **how):
        raise (SharedError if kind == "shared" else OpenELMError)("Too bad.")

    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("converters.pretraining.run.pretrain", fail)
    monkeypatch.setattr(time, "sleep", waited.append)
    result = call("pretrain", "-c", "pretrain/stories")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == ("" if kind == "shared" else "error: Too bad.\n")
    assert len(waited) == (kind == "shared")


def test_running_out_of_device_memory_is_reported(tmp_path, monkeypatch):
    def fail(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("converters.pretraining.run.parallelize", fail)
    with pytest.raises(OpenELMError, match=r"Process 0 is out of memory on cpu; lower"):
        pretrain(small_recipe(tmp_path))
