"""The compiled update of a linear model, compared with the plain one."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_openelm.model.lora import LoRALinear
from mlx_openelm.training.arrays import flatten
from mlx_openelm.training.compiled_step import CompiledStep
from mlx_openelm.training.distributed import World
from mlx_openelm.training.objective import PaddedBatch, Totals
from mlx_openelm.training.optimizer import make_optimizer
from mlx_openelm.training.step import Part, Step

ROWS = 8


@pytest.fixture
def compiled():
    mx.enable_compile()  # the tests disable it, as the C++ compiler takes seconds
    yield
    mx.disable_compile()


class SquaredError:
    """The sum of (model(x) - y)^2 over samples (x, y), also over padded batches."""

    unit, pairwise = "sample", False
    traced = 0

    def collate(self, samples):
        return mx.array(samples)

    def loss(self, model, batch):
        return self._losses(model, batch).sum(), mx.zeros(0)

    def totals(self, batch, loss, margins):
        return Totals(float(loss.item()), batch.shape[0])

    def pad(self, samples):
        rows = np.zeros((ROWS, 4), np.float32)
        rows[: len(samples)] = samples
        used = mx.arange(ROWS) < len(samples)
        return PaddedBatch({"rows": mx.array(rows), "used": used}, len(samples))

    def padded_loss(self, model, arrays):
        self.traced += 1
        losses = mx.where(arrays["used"], self._losses(model, arrays["rows"]), 0)
        return losses.sum(), mx.array(2.0), losses.max()

    def _losses(self, model, batch):
        return mx.square(model(batch[:, :-1])[:, 0] - batch[:, -1])


def make_steps(optimizer="adamw", clip_norm=0.5, adapter=False):
    """Return (model, optimizer, step) twice: plain and compiled."""
    made = []
    for kind in (Step, CompiledStep):
        mx.random.seed(0)
        model = nn.Linear(3, 1, bias=False)
        if adapter:
            lora_a, lora_b = mx.random.normal((3, 2)), mx.random.normal((2, 1))
            model = nn.Sequential(LoRALinear(model, lora_a, lora_b, 1.0, 0.5))
        chosen = make_optimizer(model, optimizer, (0.9, 0.95), 1e-8, 0.1)
        world = (World(0, 1),) if kind is Step else ()
        objective = SquaredError()
        step = kind(model, objective, chosen, *world, clip_norm=clip_norm)
        made.append((model, chosen, step, objective))
    return made


def parts_of(seed, *sizes):
    rng = np.random.default_rng(seed)
    for number, size in enumerate(sizes):
        indices = tuple(range(10 * number, 10 * number + size))
        yield Part(number, indices, rng.normal(size=(size, 4)).tolist())


def state_of(model, optimizer):
    return flatten(model.parameters()) | flatten(optimizer.state)


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("sizes", [(6,), (3, 5)])
@pytest.mark.parametrize("adapter", [False, True])
def test_an_update_is_that_of_the_plain_step(optimizer, sizes, adapter):
    (plain, state, step, _), (model, own_state, own_step, _) = make_steps(
        optimizer, adapter=adapter
    )
    for i in range(3):
        expected = step.update(parts_of(i, *sizes), learning_rate=0.1 / (i + 1))
        result = own_step.update(parts_of(i, *sizes), learning_rate=0.1 / (i + 1))
        assert result.totals.loss == pytest.approx(expected.totals.loss, rel=1e-5)
        assert result.totals.count == expected.totals.count == sum(sizes)
        assert result.totals.wins == 2 * len(sizes)
        assert result.norm == pytest.approx(expected.norm, rel=1e-5)
        assert result.applied
        assert_close(state_of(model, own_state), state_of(plain, state))


@pytest.mark.parametrize("sizes", [(6,), (3, 5)])
def test_it_is_traced_once_and_leaves_only_values_in_the_model(compiled, sizes):
    _, (model, optimizer, step, objective) = make_steps("sgd")
    for i in range(4):
        step.update(parts_of(i, *(n - (i == 2) for n in sizes)), learning_rate=0.1)
        for array in state_of(model, optimizer).values():
            np.array(array)  # fails for an array of a trace
    assert objective.traced == 1


def test_the_host_waits_once_for_an_update(monkeypatch):
    _, (_, _, step, _) = make_steps()
    calls = []
    evaluate = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *a: (calls.append(1), evaluate(*a)))
    step.update(parts_of(0, 3, 5), learning_rate=0.1)
    assert len(calls) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sizes", [(6,), (3, 5)])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_batch_that_is_not_finite_changes_nothing(bad, sizes, adapter):
    _, (model, optimizer, step, _) = make_steps(adapter=adapter)
    step.update(parts_of(0, *sizes), learning_rate=0.1)
    before = {n: np.array(a) for n, a in state_of(model, optimizer).items()}
    parts = list(parts_of(1, *sizes))
    parts[-1].samples[1][0] = bad
    result = step.update(iter(parts), learning_rate=0.7)
    assert not result.applied
    assert result.non_finite == list(parts[-1].indices)
    for name, array in state_of(model, optimizer).items():
        assert np.array_equal(array, before[name]), name
    assert step.update(parts_of(2, *sizes), learning_rate=0.1).applied


def test_dropout_uses_the_key_of_each_part(compiled):
    def keyed(model, i):
        for number, part in enumerate(parts_of(i, 3, 5)):
            model.layers[0].use_key(mx.random.key(10 * i + number))
            yield part
        model.layers[0].use_key(None)

    results = []
    for repeated in (False, True):
        _, (model, optimizer, step, _) = make_steps(adapter=True)
        keys = (0, 0) if repeated else (0, 1)
        for i in keys:
            step.update(keyed(model, i), learning_rate=0.1)
        results.append(state_of(model, optimizer))
        assert model.layers[0].key is None
    assert not np.array_equal(
        results[0]["layers.0.lora_a"], results[1]["layers.0.lora_a"]
    )


def test_stop_is_called_before_the_host_waits():
    _, (_, _, step, _) = make_steps()
    assert step.update(parts_of(0, 4), learning_rate=0.1, stop=lambda: True).stop
