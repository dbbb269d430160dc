"""One update as compiled functions: for a GPU, which the host must not keep waiting.

Forward and backward pass, sum over micro-batches, clipping and optimizer are compiled,
for each shape of a padded batch. The host waits once, for the results of the update.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map_with_path, tree_unflatten

from mlx_openelm.model.lora import InputLoRAEmbedding, LoRAEmbedding, LoRALinear
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.training.arrays import flatten, trained_tensors
from mlx_openelm.training.objective import PaddedBatch, PaddedObjective, Totals
from mlx_openelm.training.step import Part, StepResult, gradient_norm

Tensors = Mapping[str, mx.array]


class CompiledStep:
    """Updates the trainable weights of a model, as `Step` does, in one process.

    An adapter has many small arrays, whose cost is the number of operations: the old
    arrays are kept until the host has read whether the update is finite. In a full
    fine-tuning the device chooses the old or the new values, so no copy is kept.

    Args:
        clip_norm: maximum norm of the gradient of the mean loss; 0 or None: no limit.
    """

    def __init__(
        self,
        model: OpenELM,
        objective: PaddedObjective,
        optimizer: optim.Optimizer,
        *,
        clip_norm: float | None,
    ) -> None:
        self._model, self._objective, self._optimizer = model, objective, optimizer
        self._clip_norm = clip_norm
        self._with_dropout = [
            module
            for module in model.modules()
            if isinstance(module, LoRALinear) and module.dropout > 0
        ]
        self._is_adapter = any(
            isinstance(module, LoRALinear | LoRAEmbedding | InputLoRAEmbedding)
            for module in model.modules()
        )
        self._update_at_once = mx.compile(self._update_from_batch)
        self._add = mx.compile(self._add_part)
        self._finish = mx.compile(self._apply)

    def update(
        self,
        parts: Iterable[Part],
        *,
        learning_rate: float,
        stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Make one update, unless it is not finite; see `Step.update`."""
        trained: Tensors = trained_tensors(self._model)
        state: Tensors = flatten(self._optimizer.state)
        kept = (trained, state) if self._is_adapter else None
        rate = mx.array(learning_rate)
        indices, sums = list[tuple[int, ...]](), list[mx.array]()
        held: tuple[PaddedBatch, list[mx.array]] | None = None
        gradients: Tensors | None = None
        count = 0
        for part in parts:
            if held is not None:  # more than one part
                gradients = self._queue_part(trained, held, gradients, sums)
            held = self._objective.pad(part.samples), self._keys()
            indices.append(part.indices)
            count += held[0].count
        assert held is not None, "a step has no sample"
        total = mx.array(float(count))
        if gradients is None:
            arguments = held[0].arrays, held[1]
            trained, state, own, report = self._update_at_once(
                trained, state, *arguments, total, rate
            )
            sums.append(own)
        else:
            gradients = self._queue_part(trained, held, gradients, sums)
            trained, state, report = self._finish(
                trained, state, gradients, mx.stack(sums), total, rate
            )
        self._set(trained, state)
        del trained, state, gradients  # donates the old arrays, unless they are kept
        requested = stop()
        mx.eval(
            *(self._model.trainable_parameters(), self._optimizer.state, report, sums)
        )
        norm, applied = np.array(report, np.float64).tolist()
        if kept is not None and not applied:
            self._set(*kept)
        rows = np.array([np.array(each) for each in sums], np.float64)  # (parts, 3)
        loss, wins, margin = rows.sum(axis=0).tolist()
        bad = [part for part, row in enumerate(rows) if not np.isfinite(row[0])]
        return StepResult(
            Totals(loss, count, wins, margin),
            norm,
            bool(applied),
            [i for part in bad for i in indices[part]],
            requested,
        )

    def _queue_part(
        self,
        trained: Tensors,
        held: tuple[PaddedBatch, list[mx.array]],
        gradients: Tensors | None,
        sums: list[mx.array],
    ) -> Tensors:
        """Queue a part of several; return the sum of the gradients so far."""
        batch, keys = held
        if gradients is None:
            gradients = {name: mx.zeros_like(array) for name, array in trained.items()}
        gradients, own = self._add(trained, batch.arrays, keys, gradients)
        sums.append(own)
        mx.async_eval(gradients, own)
        return gradients

    # Compiled --------------------------------------------------------------------

    def _update_from_batch(
        self,
        trained: Tensors,
        state: Tensors,
        arrays: Tensors,
        keys: list[mx.array],
        count: mx.array,
        rate: mx.array,
    ) -> tuple[Tensors, Tensors, mx.array, mx.array]:
        with self._traced(trained, state, keys):
            gradients, sums = self._differentiate(trained, arrays)
            updated, new_state, report = self._select(
                trained, state, gradients, sums[None], count, rate
            )
        return updated, new_state, sums, report

    def _add_part(
        self,
        trained: Tensors,
        arrays: Tensors,
        keys: list[mx.array],
        gradients: Tensors,
    ) -> tuple[Tensors, mx.array]:
        with self._traced(trained, {}, keys):
            own, sums = self._differentiate(trained, arrays)
        return {name: gradients[name] + own[name] for name in own}, sums

    def _apply(
        self,
        trained: Tensors,
        state: Tensors,
        gradients: Tensors,
        sums: mx.array,
        count: mx.array,
        rate: mx.array,
    ) -> tuple[Tensors, Tensors, mx.array]:
        with self._traced(trained, state, []):
            return self._select(trained, state, gradients, sums, count, rate)

    def _differentiate(
        self, trained: Tensors, arrays: Tensors
    ) -> tuple[Tensors, mx.array]:
        """Return the gradients, and loss, wins and margin of the batch, (3,)."""

        def loss(trained: Tensors) -> tuple[mx.array, mx.array, mx.array]:
            self._model.update(tree_unflatten(list(trained.items())))
            return self._objective.padded_loss(self._model, arrays)

        sums, gradients = mx.value_and_grad(loss)(trained)
        self._model.update(tree_unflatten(list(trained.items())))
        return gradients, mx.stack(list(sums))

    def _select(
        self,
        trained: Tensors,
        state: Tensors,
        gradients: Tensors,
        sums: mx.array,
        count: mx.array,
        rate: mx.array,
    ) -> tuple[Tensors, Tensors, mx.array]:
        """Return updated weights and state, and the report of the update.

        If loss or gradient is not finite, weights and state are the old ones, except
        those of an adapter. The report has the norm of the mean gradient, and 1 if both
        are finite.
        """
        if self._is_adapter:  # to copy a gradient is one operation, its norm several
            parts = [array.flatten() for array in gradients.values()]
            norm = gradient_norm([mx.concatenate(parts)]) / count
        else:
            norm = gradient_norm(gradients) / count
        finite = mx.isfinite(sums[:, 0].sum()) & mx.isfinite(norm)
        factor = 1 / count
        if self._clip_norm:
            factor = factor * mx.minimum(1.0, self._clip_norm / (norm + 1e-6))
        scaled = {name: array * factor for name, array in gradients.items()}
        self._optimizer.learning_rate = rate
        self._optimizer.update(self._model, tree_unflatten(list(scaled.items())))
        updated: Tensors = trained_tensors(self._model)
        new_state: Tensors = flatten(self._optimizer.state)
        if not self._is_adapter:
            updated, new_state = (
                {name: mx.where(finite, new[name], old[name]) for name in new}
                for old, new in ((trained, updated), (state, new_state))
            )
        return updated, new_state, mx.stack([norm, finite.astype(mx.float32)])

    # The model while a function is traced ----------------------------------------

    @contextmanager
    def _traced(
        self, trained: Tensors, state: Tensors, keys: list[mx.array]
    ) -> Iterator[None]:
        """Compute with these arrays in the model; restore its own ones afterwards."""
        before = trained_tensors(self._model), flatten(self._optimizer.state)
        own_keys = [module.key for module in self._with_dropout]
        self._set(trained, state)
        self._use_keys(keys)
        try:
            yield
        finally:
            self._set(*before)
            self._use_keys(own_keys)

    def _set(self, trained: Tensors, state: Tensors) -> None:
        self._model.update(tree_unflatten(list(trained.items())))
        if state:
            self._optimizer.state = tree_map_with_path(
                lambda path, _: state[path], self._optimizer.state
            )

    def _keys(self) -> list[mx.array]:
        """Return the random keys of dropout; empty if there is none."""
        keys = [module.key for module in self._with_dropout]
        return [key for key in keys if key is not None]

    def _use_keys(self, keys: Sequence[mx.array | None]) -> None:
        for module, key in zip(self._with_dropout, keys, strict=False):
            module.use_key(key)
