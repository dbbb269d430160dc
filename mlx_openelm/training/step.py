"""One update: gradients of micro-batches, summed over processes, clipped, applied."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.training.arrays import flatten, to_float
from mlx_openelm.training.distributed import World
from mlx_openelm.training.objective import Objective, Totals


@dataclass(frozen=True, slots=True)
class Part:
    """A micro-batch: the samples of one forward and backward pass.

    Attributes:
        number: index of the part in the step, over all processes.
        indices: indices of its samples in the training data.
    """

    number: int
    indices: tuple[int, ...]
    samples: Sequence[Any]


@dataclass(slots=True)
class StepResult:
    """The result of an update.

    Attributes:
        totals: sums over all parts and processes.
        norm: norm of the gradient of the mean loss, before clipping.
        applied: whether loss and gradient were finite, so that the weights changed.
        non_finite: indices of samples in this process's parts with a non-finite loss.
        stop: whether any process received a request to stop.
    """

    totals: Totals
    norm: float
    applied: bool
    non_finite: list[int] = field(default_factory=list)
    stop: bool = False


class Step:
    """Updates the trainable weights of a model.

    Args:
        clip_norm: maximum norm of the gradient of the mean loss; 0 or None: no limit.
    """

    def __init__(
        self,
        model: OpenELM,
        objective: Objective,
        optimizer: optim.Optimizer,
        world: World,
        *,
        clip_norm: float | None,
    ) -> None:
        self._model, self._objective, self._optimizer = model, objective, optimizer
        self._world, self._clip_norm = world, clip_norm

        def loss(batch: Any) -> tuple[mx.array, mx.array]:
            return objective.loss(model, batch)

        self._differentiate = nn.value_and_grad(model, loss)

    def update(
        self,
        parts: Iterable[Part],
        *,
        learning_rate: float,
        stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Make one update, unless loss or gradient are not finite.

        Args:
            parts: micro-batches of this process, consumed one by one: the iterator can
                set the dropout keys of a part before it yields the part.
            stop: returns whether this process should stop; called after the last part.
        """
        totals, gradients, non_finite = Totals(), None, list[int]()
        for part in parts:
            part_totals, gradient = self._compute_gradient(part)
            totals.add(part_totals)
            if not math.isfinite(part_totals.loss):
                non_finite += part.indices
            gradients = (
                gradient if gradients is None else tree_map(mx.add, gradients, gradient)
            )
            mx.eval(gradients)
        if gradients is None:  # fewer samples than processes
            gradients = tree_map(mx.zeros_like, self._model.trainable_parameters())
        if self._world.size > 1:
            # MLX averages in a few large messages; multiply to get the sum.
            gradients = nn.average_gradients(gradients)
            gradients = tree_map(lambda g: g * self._world.size, gradients)
        totals, stop_requested = self._sum_over_processes(totals, stop())
        norm = to_float(gradient_norm(gradients)) / max(1, totals.count)
        applied = math.isfinite(totals.loss) and math.isfinite(norm)
        if applied:
            self._apply(gradients, norm, totals.count, learning_rate)
        return StepResult(totals, norm, applied, non_finite, stop_requested)

    def _compute_gradient(self, part: Part) -> tuple[Totals, Any]:
        batch = self._objective.collate(part.samples)
        (loss, margins), gradient = self._differentiate(batch)
        mx.eval(loss, margins, gradient)
        return self._objective.totals(batch, loss, margins), gradient

    def _sum_over_processes(self, totals: Totals, stop: bool) -> tuple[Totals, bool]:
        values = [totals.loss, totals.count, totals.wins, totals.margin, stop]
        summed = self._world.sum(mx.array(values, mx.float32))
        loss, count, wins, margin, stops = np.array(summed, np.float64).tolist()
        return Totals(loss, round(count), wins, margin), stops > 0

    def _apply(
        self, gradients: Any, norm: float, count: int, learning_rate: float
    ) -> None:
        limit = self._clip_norm
        factor = (min(1.0, limit / (norm + 1e-6)) if limit else 1.0) / count
        self._optimizer.learning_rate = learning_rate
        self._optimizer.update(
            self._model, tree_map(lambda gradient: gradient * factor, gradients)
        )
        mx.eval(self._model.trainable_parameters(), self._optimizer.state)


def gradient_norm(gradients: Any) -> mx.array:
    """Return the global L2 norm of a tree of gradients, float32."""
    arrays = flatten(gradients).values()
    squares = [mx.square(array.astype(mx.float32)).sum() for array in arrays]
    return mx.sqrt(mx.stack(squares).sum())
