"""The reference training loop: it learns, and it can be cut anywhere and go on."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from models import TEXT

torch = pytest.importorskip("torch", reason="needs PyTorch")

from converters.pretrain import (  # noqa: E402
    AVERAGE,
    LAST,
    Evaluated,
    Saved,
    Started,
    Trained,
    average_checkpoints,
    build_optimizers,
    learning_rate,
    pretrain,
)
from converters.reference import ReferenceOpenELM  # noqa: E402
from mlx_openelm.config import OpenELMConfig  # noqa: E402
from mlx_openelm.errors import OpenELMError  # noqa: E402
from mlx_openelm.pretrain_recipe import (  # noqa: E402
    DataRecipe,
    ModelRecipe,
    OptimizerRecipe,
    PretrainRecipe,
    TokenizerRecipe,
)
from mlx_openelm.recipe import bundled_recipes, load_recipe  # noqa: E402


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "train.txt").write_text(TEXT * 2)
    (tmp_path / "heldout.txt").write_text(TEXT[:600])
    return PretrainRecipe(
        model=ModelRecipe(
            num_layers=2,
            model_dim=32,
            head_dim=16,
            num_gqa_groups=1,
            ffn_dim_divisor=16,
            max_context_length=32,
        ),
        data=DataRecipe(
            train=(str(tmp_path / "train.txt"),),
            heldout=(str(tmp_path / "heldout.txt"),),
            packing=True,
        ),
        tokenizer=TokenizerRecipe(vocab_size=300),
        optimizer=OptimizerRecipe(learning_rate=5e-3, warmup_steps=4),
        output=str(tmp_path / "run"),
        steps=12,
        batch_size=4,
        report_every=1,
        eval_every=6,
        save_every=4,
        eval_window=16,
        average_last=2,
    )


def losses(events):
    return [e.loss for e in events if isinstance(e, Trained)]


def test_a_run_learns_tells_and_leaves_what_convert_reads(recipe):
    events = []
    path = pretrain(replace(recipe, steps=40), on_event=events.append)
    found = losses(events)
    assert len(found) == 40
    assert found[0] == pytest.approx(math.log(300), abs=0.7)
    assert found[-1] < found[0] - 0.8
    assert isinstance(events[0], Started)
    scores = [e for e in events if isinstance(e, Evaluated)]
    assert scores[-1].nats_per_token < scores[0].nats_per_token
    assert [e.step for e in events if isinstance(e, Saved)][-1] == 40
    run = Path(recipe.output)
    written = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["loss"] for r in written if r["event"] == "trained"] == found
    from converters.sources import open_source

    source = open_source(str(path))
    assert source.config == OpenELMConfig.from_file(run / "config.json")
    assert source.config.max_context_length == 32


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_interrupted_run_goes_on_bit_for_bit(recipe, tmp_path, name):
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, name=name))
    whole = pretrain(replace(recipe, output=str(tmp_path / "whole")))

    def interrupt(event):
        if isinstance(event, Trained) and event.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, on_event=interrupt)
    state = torch.load(Path(recipe.output) / LAST, weights_only=True)
    assert state["iterations"] == 7
    parted = pretrain(recipe, resume=True)
    one, two = (torch.load(p, weights_only=True) for p in (whole, parted))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_sigterm_saves_and_leaves_with_143(recipe):
    def terminate(event):
        if isinstance(event, Trained) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        pretrain(recipe, on_event=terminate)
    assert stopped.value.code == 143
    assert torch.load(Path(recipe.output) / LAST, weights_only=True)["iterations"] == 3


def test_runs_are_not_overwritten_and_recipes_not_mixed_up(recipe):
    with pytest.raises(OpenELMError, match="nothing to resume"):
        pretrain(recipe, resume=True)
    pretrain(replace(recipe, steps=4))
    with pytest.raises(OpenELMError, match="--resume"):
        pretrain(recipe)
    with pytest.raises(OpenELMError, match="steps: 4 -> 12"):
        pretrain(recipe, resume=True)


def test_a_damaged_run_is_not_resumed_and_said(recipe):
    pretrain(replace(recipe, steps=4))
    last = Path(recipe.output) / LAST
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OpenELMError, match="damaged"):
        pretrain(replace(recipe, steps=4), resume=True)
    last.write_bytes(whole)
    (Path(recipe.output) / "recipe.json").unlink()
    with pytest.raises(OpenELMError, match=r"recipe\.json"):
        pretrain(replace(recipe, steps=4), resume=True)


def test_accumulated_parts_equal_the_whole_batch(recipe, tmp_path):
    events: dict = {1: [], 4: []}
    for micro in events:
        pretrain(
            replace(recipe, micro_batch_size=micro, output=str(tmp_path / str(micro))),
            on_event=events[micro].append,
        )
    assert losses(events[1]) == pytest.approx(losses(events[4]), abs=1e-5)


def test_padded_batches_count_their_tokens_not_their_rows(recipe, tmp_path):
    data = replace(recipe.data, packing=False, min_tokens=1, min_characters=1)
    data = replace(data, words_per_piece=9)
    events: dict = {1: [], 4: []}
    for micro in events:
        pretrain(
            replace(
                recipe,
                data=data,
                micro_batch_size=micro,
                output=str(tmp_path / f"padded-{micro}"),
            ),
            on_event=events[micro].append,
        )
    assert losses(events[1]) == pytest.approx(losses(events[4]), abs=1e-5)


def test_two_processes_train_as_one(recipe, tmp_path):
    """torchrun itself, two processes on the CPU, against one: same losses."""
    import yaml

    one = replace(recipe, steps=6, output=str(tmp_path / "one"))
    events: list = []
    pretrain(one, on_event=events.append)
    given = json.loads((tmp_path / "one" / "recipe.json").read_text())
    (tmp_path / "two.yaml").write_text(
        yaml.safe_dump(given | {"output": str(tmp_path / "two")})
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", "29533"]
    command += ["-m", "mlx_openelm", "pretrain", "-c", str(tmp_path / "two.yaml")]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "two" / AVERAGE)  # rank 0 alone speaks
    metrics = (tmp_path / "two" / "metrics.jsonl").read_text()
    written = [json.loads(line) for line in metrics.splitlines()]
    found = [r["loss"] for r in written if r["event"] == "trained"]
    assert found == pytest.approx(losses(events), abs=1e-5)


def test_the_rate_warms_up_and_follows_a_cosine():
    recipe = OptimizerRecipe()  # the published 270M
    rates = [learning_rate(recipe, step, 350_000) for step in range(0, 350_000, 500)]
    assert rates[0] == 1e-6
    assert learning_rate(recipe, 2500, 350_000) == pytest.approx(2.65e-3, rel=1e-3)
    assert learning_rate(recipe, 5000, 350_000) == 5.3e-3
    middle = learning_rate(recipe, 5000 + 172_500, 350_000)
    assert middle == pytest.approx((5.3e-3 + 5.3e-4) / 2, rel=1e-3)
    assert learning_rate(recipe, 349_999, 350_000) == pytest.approx(5.3e-4, rel=1e-4)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_matrices_decay_and_vectors_do_not():
    config = OpenELMConfig.scaled(
        num_layers=2, model_dim=32, head_dim=16, num_gqa_groups=1, vocab_size=50
    )
    model = ReferenceOpenELM(config)
    for name in ("adamw", "muon"):
        optimizers = build_optimizers(model, OptimizerRecipe(name=name))
        groups = [g for o in optimizers for g in o.param_groups]
        held = [p for g in groups for p in g["params"]]
        assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
        for group in groups:
            expected = 0.1 if group["params"][0].ndim >= 2 else 0.0
            assert group["weight_decay"] == expected
            assert len({p.ndim >= 2 for p in group["params"]}) == 1
        assert len(optimizers) == (1 if name == "adamw" else 2)


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


def test_every_bundled_recipe_of_ours_is_whole():
    found = bundled_recipes()
    names = [name for name in found if name.startswith("pretrain/")]
    assert "pretrain/stories" in names
    for name in names:
        built = load_recipe(PretrainRecipe, name, {"steps": 7, "data.train": ["x"]})
        assert built.steps == 7
        assert built.data.train == ("x",)
        assert built.model.build(4096).num_parameters > 1e6
        assert found[name].read_text().startswith("# ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {name: 270M}\ndata: {}\nstpes: 3\n",
            r"stpes \(did you mean steps\?\)",
        ),
        ("model: {name: 270M}\ndata: {trian: [a]}\n", r"data\.trian \(did you mean"),
        (
            "model: {name: 270M}\ndata: {}\nsteps: many\n",
            "steps is 'many', expected int",
        ),
        ("model: {name: 270M}\ndata: {}\nsteps: true\n", "steps is True"),
        ("model: {name: 270M}\ndata: {}\noptimizer: {name: sgd}\n", "adamw or muon"),
        ("data: {}\n", "model is missing"),
        ("- a\n- b\n", "holds a list"),
        ("model: [\n", "cannot be parsed"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(OpenELMError, match=message):
        load_recipe(PretrainRecipe, str(path), {})
