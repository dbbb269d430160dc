"""One update of a linear model, compared with formulas in NumPy."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_openelm.errors import OpenELMError
from mlx_openelm.training.distributed import World
from mlx_openelm.training.non_finite import refuse_repeated
from mlx_openelm.training.objective import Totals
from mlx_openelm.training.optimizer import make_optimizer
from mlx_openelm.training.state import TrainingProgress
from mlx_openelm.training.step import Part, Step

RATE = 0.1


class SquaredError:
    """The sum of (x w - y)^2 over samples (x, y)."""

    unit, pairwise = "sample", False

    def collate(self, samples):
        return mx.array(samples)

    def loss(self, model, batch):
        x, y = batch[:, :-1], batch[:, -1]
        return mx.square(model(x)[:, 0] - y).sum(), mx.zeros(0)

    def totals(self, batch, loss, margins):
        return Totals(float(loss.item()), batch.shape[0])


@pytest.fixture
def samples():
    return np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def make_step(clip_norm=None):
    mx.random.seed(0)
    model = nn.Linear(3, 1, bias=False)
    optimizer = make_optimizer(model, "sgd", (0.0, 0.0), 1e-8, 0.0)
    return model, Step(
        model, SquaredError(), optimizer, World(0, 1), clip_norm=clip_norm
    )


def parts_of(samples, *sizes):
    start = 0
    for number, size in enumerate(sizes):
        indices = tuple(range(start, start + size))
        yield Part(number, indices, samples[start : start + size].tolist())
        start += size


def mean_gradient(weight, samples):
    x, y = samples[:, :-1], samples[:, -1]
    return 2 * (x @ weight[0] - y) @ x / len(samples)


@pytest.mark.parametrize("sizes", [(6,), (2, 4), (1, 2, 3)])
def test_an_update_uses_the_gradient_of_the_mean_loss(samples, sizes):
    model, step = make_step()
    before = np.array(model.weight)
    result = step.update(parts_of(samples, *sizes), learning_rate=RATE)
    gradient = mean_gradient(before, samples)
    np.testing.assert_allclose(model.weight[0], before[0] - RATE * gradient, rtol=1e-5)
    assert result.applied
    assert result.totals.count == 6
    assert result.norm == pytest.approx(np.linalg.norm(gradient), rel=1e-5)


def test_the_gradient_is_clipped_to_the_norm(samples):
    model, step = make_step(clip_norm=0.01)
    before = np.array(model.weight)
    step.update(parts_of(samples, 6), learning_rate=RATE)
    moved = np.linalg.norm(np.array(model.weight) - before)
    assert moved == pytest.approx(RATE * 0.01, rel=1e-3)


def test_a_non_finite_loss_changes_no_weight_and_names_its_samples(samples):
    model, step = make_step()
    before = np.array(model.weight)
    samples[3] = math.nan
    result = step.update(parts_of(samples, 2, 2, 2), learning_rate=RATE)
    assert not result.applied
    assert result.non_finite == [2, 3]
    np.testing.assert_array_equal(model.weight, before)


def test_stop_is_called_after_the_last_part(samples):
    _, step = make_step()
    order = []

    def parts():
        for part in parts_of(samples, 3, 3):
            order.append(part.number)
            yield part

    def stop():
        order.append("stop")
        return True

    assert step.update(parts(), learning_rate=RATE, stop=stop).stop
    assert order == [0, 1, "stop"]


def test_the_third_skipped_batch_in_a_row_is_refused():
    progress = TrainingProgress(step=7)
    for _ in range(2):
        progress.add_skipped()
        refuse_repeated(progress, ["a.jsonl:1"], "nothing is kept.")
    progress.add_skipped()
    with pytest.raises(OpenELMError, match=r"step 7 \(a.jsonl:1\).* nothing is kept"):
        refuse_repeated(progress, ["a.jsonl:1"], "nothing is kept.")
    assert progress.skipped == 3


def test_vectors_have_no_weight_decay():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.vector = mx.ones((2, 2)), mx.ones((2,))

    model = Both()
    optimizer = make_optimizer(model, "adamw", (0.9, 0.95), 1e-8, 0.5)
    optimizer.learning_rate = RATE
    zeros = {"matrix": mx.zeros((2, 2)), "vector": mx.zeros((2,))}
    optimizer.update(model, zeros)
    assert np.allclose(model.matrix, 1 - RATE * 0.5)
    assert np.array_equal(np.array(model.vector), np.ones(2, np.float32))


def test_the_window_has_the_updates_since_the_last_report():
    progress = TrainingProgress(seconds=2.5, skipped_in_row=2)
    progress.add_update(Totals(3.0, 4, wins=2.0, margin=1.5))
    progress.add_update(Totals(1.0, 2, wins=1.0, margin=-0.5))
    assert (progress.window_loss, progress.window_tokens) == (4.0, 6)
    assert (progress.window_wins, progress.window_margin) == (3.0, 1.0)
    assert progress.skipped_in_row == 0
    progress.start_window()
    assert (progress.window_loss, progress.window_tokens) == (0.0, 0)
    assert (progress.window_wins, progress.window_margin) == (0.0, 0.0)
    assert (progress.tokens, progress.reported) == (6, 2.5)
