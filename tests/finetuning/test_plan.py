"""The planned order and memory of a run, compared with the actual ones."""

import gc
from collections import Counter
from dataclasses import replace
from itertools import chain

import mlx.core as mx
import numpy as np
import pytest
from models import UNEVEN
from trainings import make_model, make_recipe, make_samples, make_training, step

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.device import FORCED_PATH
from mlx_openelm.finetuning.plan import (
    BatchShape,
    Order,
    count_bytes,
    largest_batch,
    plan_memory,
    propose_smaller,
)
from mlx_openelm.finetuning.preparation import make_trainable
from mlx_openelm.finetuning.samples import lengths_of, targets_of
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.training.arrays import trained_tensors

SIZES = np.random.default_rng(0).integers(2, 60, 37).tolist()

# The order -----------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
def test_every_sample_is_taken_once_an_epoch_and_epochs_differ(pack):
    order = Order(SIZES, make_recipe(iters=None, epochs=3.0, pack=pack, batch_size=2))
    step, epochs = 0, []
    for epoch in range(3):
        taken: list[int] = []
        while order.epoch_after(step) < epoch + 1:
            taken += order.batch(step)
            step += 1
        assert sorted(taken) == list(range(len(SIZES)))
        epochs.append(taken)
    assert step == order.steps
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_packed_step_has_at_most_its_number_of_rows():
    recipe = make_recipe(pack=True, max_seq_length=64, batch_size=2, iters=3)
    order = Order(SIZES, recipe)
    for i in range(3):
        assert sum(SIZES[j] for j in order.batch(i)) <= recipe.step_size * 64
    assert len(order.batch(0)) > recipe.step_size


def test_half_an_epoch_is_half_its_steps():
    whole = Order(SIZES, make_recipe(iters=None, epochs=1.0)).steps
    assert whole == -(-37 // 6) == 7
    order = Order(SIZES, make_recipe(iters=None, epochs=2.5))
    assert order.steps == 2 * whole + round(whole / 2)
    assert order.epoch_after(order.steps) == pytest.approx(2.5, abs=0.1)
    taken = Counter(chain.from_iterable(map(order.batch, range(order.steps))))
    assert set(taken.values()) == {2, 3}
    assert Order(SIZES, make_recipe(iters=None, epochs=0.01)).steps == 1


def test_iterations_go_beyond_an_epoch_in_the_order_of_the_epochs():
    by_steps = Order(SIZES, make_recipe(iters=20))
    by_epochs = Order(SIZES, make_recipe(iters=None, epochs=3.0))
    assert (by_steps.steps, by_epochs.steps) == (20, 21)
    backwards = [by_steps.batch(i) for i in reversed(range(20))]
    assert backwards[::-1] == [by_epochs.batch(i) for i in range(20)]
    assert by_steps.epoch_after(20) == pytest.approx(20 / 7)


def test_a_run_trains_the_samples_of_its_order():
    samples = make_samples()
    training = make_training(make_recipe(batch_size=1), samples)
    seen: list[list[int]] = []
    parts = training.trainer._parts

    def watch(indices):
        for part in parts(indices):
            seen.append(part.indices)
            yield part

    training.trainer._parts = watch
    for _ in range(3):
        step(training)
    for i in range(3):
        assert sorted(chain(*seen[2 * i : 2 * i + 2])) == sorted(
            training.order.batch(i)
        )


def test_the_largest_micro_batch_is_chosen():
    order = Order(SIZES, make_recipe(iters=None, epochs=2.0))
    counted = [size // 2 for size in SIZES]
    batch = largest_batch(order, SIZES, counted, 2)
    steps = [order.batch(i) for i in range(order.steps)]
    least = max(sum(SIZES[j] for j in step) for step in steps) / 2
    assert least <= batch.tokens < least + max(SIZES)
    assert batch.targets < batch.tokens
    assert batch.longest in SIZES
    assert largest_batch(order, SIZES, counted, 6).tokens == max(SIZES)


# Memory --------------------------------------------------------------------------

DEMO = OpenELMConfig(  # the demo model's shape
    model_dim=256,
    head_dim=64,
    num_query_heads=(2, 3, 3, 3, 3, 4, 4, 4),
    num_kv_heads=(2, 3, 3, 3, 3, 4, 4, 4),
    ffn_dims=(128, 256, 384, 512, 640, 768, 896, 1024),
    vocab_size=4096,
    max_context_length=2048,
)
SMALL = replace(DEMO, model_dim=128, head_dim=32, vocab_size=512)
BIG = replace(DEMO, vocab_size=32000)
proof = pytest.mark.proof


@pytest.mark.parametrize(
    ("config", "lengths", "options"),
    [
        (UNEVEN, (20,) * 16, {}),
        (UNEVEN, (500,) * 2, {}),
        (SMALL, (10, 90, 40, 30) * 3, {"grad_accumulation_steps": 2}),
        (SMALL, (40,) * 12, {}),
        (SMALL, (40,) * 12, {"grad_checkpoint": True}),
        (SMALL, (40,) * 12, {"fine_tune_type": "full"}),
        (SMALL, (300,), {"fine_tune_type": "dora"}),
        (SMALL, (300,), {"dropout": 0.1}),
        (SMALL, (300,), {"num_layers": 2}),
        pytest.param(DEMO, (500,) * 4, {}, marks=proof),
        pytest.param(DEMO, (500,) * 4, {"dropout": 0.1}, marks=proof),
        pytest.param(DEMO, (500,) * 4, {"fine_tune_type": "dora"}, marks=proof),
        pytest.param(DEMO, (500,) * 4, {"fine_tune_type": "full"}, marks=proof),
        pytest.param(DEMO, (500,) * 4, {"grad_checkpoint": True}, marks=proof),
        pytest.param(DEMO, (500,) * 4, {"grad_accumulation_steps": 4}, marks=proof),
        pytest.param(BIG, (1024,), {}, marks=proof),
        pytest.param(BIG, (1024,) * 2, {}, marks=proof),
        pytest.param(BIG, (1024,), {"grad_checkpoint": True}, marks=proof),
        pytest.param(BIG, (1024,), {"fine_tune_type": "full"}, marks=proof),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_the_planned_memory_is_close_to_that_of_a_step(config, lengths, options):
    planned, measured = measure(config, lengths, options)
    assert 0.9 * measured <= planned <= 1.4 * measured


@pytest.mark.parametrize(
    ("config", "lengths", "options"),
    [
        (SMALL, (40,) * 4, {}),
        (SMALL, (300,) * 2, {}),
        pytest.param(SMALL, (300,), {"fine_tune_type": "full"}, marks=proof),
        pytest.param(DEMO, (250,) * 4, {}, marks=proof),
    ],
)
def test_the_planned_memory_is_close_to_that_of_a_step_for_a_gpu(
    monkeypatch, config, lengths, options
):
    monkeypatch.setenv(FORCED_PATH, "1")
    planned, measured = measure(config, lengths, options)
    assert 0.95 * measured <= planned <= 1.3 * measured


def measure(config, lengths, options):
    """Return the planned and the measured peak memory of a step, in bytes."""
    gc.collect()
    before = mx.get_active_memory()
    parts = options.get("grad_accumulation_steps", 1)
    defaults = {"rank": 16, "max_seq_length": 2048, "grad_accumulation_steps": 1}
    defaults["batch_size"] = len(lengths) // parts
    recipe = make_recipe(**{**defaults, **options})
    model = OpenELM(config)
    make_trainable(model, recipe)
    mx.eval(model.parameters())
    samples = make_samples(lengths, config.vocab_size)
    training = make_training(recipe, samples, model)
    step(training)
    mx.reset_peak_memory()
    step(training)
    measured = mx.get_peak_memory() - before
    sizes, counted = lengths_of(samples), targets_of(samples)
    batch = largest_batch(training.order, sizes, counted, parts)
    return plan_memory(model, recipe, batch).total, measured


def test_nothing_is_computed_for_a_plan():
    model = OpenELM(replace(BIG, vocab_size=32000, model_dim=4096))
    recipe = make_recipe()
    gc.collect()
    before = mx.get_active_memory()
    make_trainable(model, recipe)
    plan = plan_memory(model, recipe, BatchShape(1000, 500, 1000))
    assert mx.get_active_memory() - before < 2 * plan.adapter
    assert plan.weights == 4 * model.config.num_parameters


def test_the_plan_separates_weights_and_adapter():
    model = make_model(make_recipe())
    plan = plan_memory(model, make_recipe(), BatchShape(100, 50, 40))
    adapter = sum(array.nbytes for array in trained_tensors(model).values())
    assert plan.adapter == adapter
    assert plan.weights == count_bytes(model) - adapter
    assert plan.optimizer == 2 * adapter
    assert plan.total > plan.weights + 4 * adapter


def test_every_proposal_needs_less_than_the_one_before():
    recipe = make_recipe(batch_size=4, grad_accumulation_steps=1, max_seq_length=512)
    model = make_model(recipe)

    def total(recipe):
        longest = recipe.max_seq_length
        tokens = longest * recipe.batch_size
        batch = BatchShape(tokens, tokens // 2, longest)
        return plan_memory(model, recipe, batch).total

    proposals = propose_smaller(recipe)
    totals = [total(recipe), *(total(smaller) for _, smaller in proposals)]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals) == 6
    assert [settings for settings, _ in proposals] == [
        "`grad_checkpoint`",
        "`grad_checkpoint` `batch_size` 2 `grad_accumulation_steps` 2",
        "`grad_checkpoint` `batch_size` 1 `grad_accumulation_steps` 4",
        "`grad_checkpoint` `batch_size` 1 `grad_accumulation_steps` 4 "
        "`max_seq_length` 256",
        "`grad_checkpoint` `batch_size` 1 `grad_accumulation_steps` 4 "
        "`max_seq_length` 128",
    ]
    assert all(smaller.step_size == 4 for _, smaller in proposals)


def test_the_defaultsof_a_proposal_are_all_its_changes():
    recipe = make_recipe(batch_size=6, grad_accumulation_steps=1, max_seq_length=256)
    assert [settings for settings, _ in propose_smaller(recipe)] == [
        "`grad_checkpoint`",
        "`grad_checkpoint` `batch_size` 3 `grad_accumulation_steps` 2",
        "`grad_checkpoint` `batch_size` 3 `grad_accumulation_steps` 2 "
        "`max_seq_length` 128",
    ]
