"""Training on the path for a GPU: padded batches, fused losses, compiled updates.

It is forced on the CPU, mostly without `mx.compile`, which takes seconds there.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
from models import UNEVEN, build
from trainings import (
    make_pairs,
    make_recipe,
    make_samples,
    make_training,
)

from mlx_openelm.device import FORCED_PATH
from mlx_openelm.finetuning.batches import collate
from mlx_openelm.finetuning.compiled.choice import chooses_compiled
from mlx_openelm.finetuning.compiled.objectives import padded_objective
from mlx_openelm.finetuning.compiled.padding import PaddedShapes, pad
from mlx_openelm.finetuning.further_objectives.choice import make_objective
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.run import finetune
from mlx_openelm.model import token_layout
from mlx_openelm.signals import Stop
from mlx_openelm.training.arrays import flatten, trained_tensors
from mlx_openelm.training.distributed import World
from mlx_openelm.tuning import DEFAULT, Tuning

# Padding -------------------------------------------------------------------------


def random_batches(number=60, size=4, longest=200, seed=0):
    rng = np.random.default_rng(seed)
    return [
        collate(make_samples(rng.integers(2, longest, size).tolist(), seed=i))
        for i in range(number)
    ]


@pytest.mark.parametrize(("size", "longest"), [(1, 60), (4, 200), (8, 2048)])
def test_batches_have_at_most_32_shapes_which_hold_them(size, longest):
    planned = random_batches(60, size, longest)
    shapes = PaddedShapes(planned, longest)
    used = set()
    for batch in planned + random_batches(120, size, longest, seed=1):
        shape = shapes.fit(batch)
        used.add(shape)
        arrays = pad(batch, shape)
        N, R, S = shape.tokens, shape.rows, shape.slots
        assert {name: array.shape for name, array in arrays.items()} == {
            **dict.fromkeys(("tokens", "places", "slots"), (N,)),
            **dict.fromkeys(("sources", "segments"), (R, S)),
            **dict.fromkeys(
                ("positions", "targets", "sequence", "is_target"), (shape.targets,)
            ),
        }
        assert len({*arrays["slots"].tolist()}) == N  # each token has its own slot
        flat = arrays["sources"].reshape(-1)
        assert np.array_equal(flat[arrays["slots"]], np.arange(N))
        assert arrays["is_target"].sum() == len(batch.targets)
    assert len(used) <= 32


def test_the_shape_of_a_batch_does_not_depend_on_the_batches_before():
    planned = random_batches()
    first, second = PaddedShapes(planned, 200), PaddedShapes(planned, 200)
    others = random_batches(seed=7)
    assert [*map(first.fit, others)] == [*map(second.fit, others[::-1])][::-1]


def test_padding_is_a_small_share_of_the_tokens():
    planned = random_batches(300, 4, 250)
    shapes = PaddedShapes(planned, 250)
    padded = sum(shapes.fit(batch).tokens for batch in planned)
    assert padded < 1.1 * sum(len(batch.tokens) for batch in planned)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("at_once", [2**26, 1])
def test_padding_changes_neither_loss_nor_gradients(monkeypatch, objective, at_once):
    monkeypatch.setattr(token_layout, "SCORES_AT_ONCE", at_once)
    recipe = make_recipe(objective=objective, fine_tune_type="full")
    samples = make_pairs() if objective == "dpo" else make_samples()
    model, plain = build(UNEVEN), make_objective(recipe)
    plain.precompute_reference(build(UNEVEN, seed=1), samples)
    padded = padded_objective(plain, recipe, [samples], 64)

    def values(loss):
        (total, *rest), gradients = mx.value_and_grad(
            lambda weights: (model.update(weights), loss())[1]
        )(model.trainable_parameters())
        return total, rest, gradients

    for count in (len(samples), 2, 1):  # the last batch of an epoch is smaller
        chosen = samples[:count]
        before = model.parameters()
        batch, own = plain.collate(chosen), padded.pad(chosen)
        total, (margins,), gradients = values(lambda b=batch: plain.loss(model, b))
        model.update(before)
        loss, (wins, margin), theirs = values(
            lambda a=own.arrays: padded.padded_loss(model, a)
        )
        model.update(before)
        totals = plain.totals(batch, total, margins)
        assert own.count == totals.count
        assert loss.item() == pytest.approx(totals.loss, rel=1e-5)
        assert wins.item() == totals.wins
        assert margin.item() == pytest.approx(totals.margin, rel=1e-4, abs=1e-5)
        expected = flatten(gradients)
        for name, gradient in flatten(theirs).items():
            size = max(mx.abs(expected[name]).max().item(), 1e-3)
            assert mx.abs(gradient - expected[name]).max() < 1e-5 * size, name


# Updates -------------------------------------------------------------------------


def weights_after(training, steps):
    for _ in range(steps):
        training.trainer.update(Stop())
    return {n: np.array(a) for n, a in trained_tensors(training.model).items()}


@pytest.mark.parametrize(
    "options", [{"objective": "dpo"}, {"pack": True}, {"optimizer": "muon"}], ids=str
)
def test_both_paths_train_the_same_weights(monkeypatch, options):
    recipe = make_recipe(iters=4, **options)
    samples = make_pairs(12) if "objective" in options else make_samples()
    plain = weights_after(make_training(recipe, samples), 4)
    monkeypatch.setenv(FORCED_PATH, "1")
    compiled = weights_after(make_training(recipe, samples), 4)
    for name, array in plain.items():
        np.testing.assert_allclose(compiled[name], array, atol=2e-5, err_msg=name)


def test_an_interrupted_compiled_run_resumes_bit_by_bit(monkeypatch):
    monkeypatch.setenv(FORCED_PATH, "1")
    recipe = make_recipe(iters=4, dropout=0.2)
    whole = weights_after(make_training(recipe, make_samples()), 4)
    first = make_training(recipe, make_samples())
    weights_after(first, 2)
    second = make_training(recipe, make_samples(), first.model)
    second.context.state.optimizer.state = first.context.state.optimizer.state
    second.progress.step = 2
    resumed = weights_after(second, 2)
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)


# A run ---------------------------------------------------------------------------


def test_the_device_chooses_the_path_of_a_new_run_and_a_resumed_one_keeps_it(
    monkeypatch, tmp_path
):
    data = tmp_path / "train.jsonl"
    lines = [json.dumps({"text": f"Once upon a time {i} " * 3}) for i in range(8)]
    data.write_text("\n".join(lines))
    options = {"iters": 1, "batch_size": 2, "rank": 4, "num_layers": 1}
    for gpu in (False, True):
        folder = tmp_path / str(gpu)
        recipe = FinetuneRecipe(data=str(data), adapter_path=str(folder), **options)
        if gpu:
            monkeypatch.setenv(FORCED_PATH, "1")
        finetune(recipe, offline=True)
        monkeypatch.delenv(FORCED_PATH, raising=False)
        for tuning in (DEFAULT, Tuning(compiled_training=not gpu)):
            assert chooses_compiled(recipe, tuning, World(0, 1), folder) is gpu
    assert chooses_compiled(recipe, Tuning(compiled_training=True), World(0, 1), None)
    assert not chooses_compiled(
        recipe, Tuning(compiled_training=True), World(0, 2), None
    )
