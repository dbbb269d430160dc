"""Draw the next tokens of a batch whose sequences have different sampling options.

Sequences with equal options form a group: its logits are shaped, filtered and drawn
from together, with the operations that draw the tokens of a single text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_openelm.generation.batching.sequences import SequenceState
from mlx_openelm.generation.constraints import keep_allowed
from mlx_openelm.generation.decoding import DrawnTokens, Token
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.sampling import (
    choose_tokens,
    history_length,
    shape_logits,
    temper,
)


@dataclass(frozen=True, slots=True)
class DrawnBatch:
    """The tokens of a queued step, by group."""

    groups: tuple[tuple[tuple[SequenceState, ...], DrawnTokens], ...]

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """The arrays to evaluate."""
        return tuple(array for _, drawn in self.groups for array in drawn.arrays)

    def queue(self) -> None:
        mx.async_eval(*self.arrays)

    def read(self) -> list[tuple[SequenceState, Token]]:
        """Wait for the tokens; return them with their sequences."""
        return [
            pair
            for members, drawn in self.groups
            for pair in zip(members, drawn.read(), strict=True)
        ]


class BatchSampler:
    """Draws the tokens of the sequences of a batch.

    `regroup` must be called after each change of the sequences.
    """

    def __init__(self, context_length: int, eos_id: int) -> None:
        self._context_length, self._eos_id = context_length, eos_id
        self._groups: list[_Group] = []
        self._row_order: mx.array | None = None  # from the groups' order to the rows'

    def regroup(self, sequences: Sequence[SequenceState]) -> None:
        """Group the batch's rows again, keeping each row's history."""
        for group in self._groups:
            group.store_histories()
        by_sampling: dict[tuple[Sampling, bool], list[int]] = {}
        for row, sequence in enumerate(sequences):
            by_sampling.setdefault(_grouped_by(sequence), []).append(row)
        self._groups = [
            _Group(sampling, [sequences[row] for row in rows], rows, self, as_alone)
            for (sampling, as_alone), rows in by_sampling.items()
        ]
        self._row_order = None
        if len(self._groups) > 1:
            order = [row for group in self._groups for row in group.rows]
            self._row_order = mx.array(np.argsort(order))

    def draw(self, logits: mx.array) -> tuple[mx.array, DrawnBatch]:
        """Draw a token for each row of logits (R, V); return them, (R,), and all."""
        whole = self._row_order is None
        drawn = [group.draw(logits, whole=whole) for group in self._groups]
        batch = DrawnBatch(
            tuple(
                (tuple(group.members), tokens)
                for group, tokens in zip(self._groups, drawn, strict=True)
            )
        )
        if self._row_order is None:
            return drawn[0].tokens, batch
        joined = mx.concatenate([tokens.tokens for tokens in drawn])
        return joined[self._row_order], batch

    def history_length(self, sampling: Sampling) -> int:
        return history_length(sampling, self._context_length)

    @property
    def eos_id(self) -> int:
        return self._eos_id


def _grouped_by(sequence: SequenceState) -> tuple[Sampling, bool]:
    """Return the options that the sequences of a group share."""
    request = sequence.request
    sampling = replace(request.sampling, seed=None, max_tokens=1, stop=(), stop_loops=0)
    return sampling, request.draws_as_alone


class _Group:
    """Rows of the batch with equal sampling options."""

    def __init__(
        self,
        sampling: Sampling,
        members: list[SequenceState],
        rows: list[int],
        sampler: BatchSampler,
        as_alone: bool,
    ) -> None:
        self._as_alone = as_alone
        self.sampling, self.members, self.rows = sampling, members, rows
        self._eos_id = sampler.eos_id
        self._length = sampler.history_length(sampling)
        self._history = mx.zeros((len(members), 0), mx.int32)
        if self._length:
            self._history = mx.stack([self._history_of(s) for s in members])

    def draw(self, logits: mx.array, *, whole: bool) -> DrawnTokens:
        """Draw from the group's rows of logits (R, V); `whole`: it has all rows."""
        own = logits if whole else logits[mx.array(self.rows)]  # (G, V)
        written = [sequence.written for sequence in self.members]
        shaped = shape_logits(
            own,
            self._history,
            self.sampling,
            written=mx.array(written),
            eos_id=self._eos_id,
        )
        shaped = self._constrain(own, shaped)
        if self.sampling.temp == 0:
            tokens = choose_tokens(shaped, self.sampling)
        else:
            keys = [s.request.keys(s.written) for s in self.members]
            tempered = temper(shaped, self.sampling)
            draw = _draw_as_alone if self._as_alone else mx.vmap(_draw_one)
            drawn: mx.array = draw(tempered, mx.array(keys, mx.uint32))
            tokens = drawn.astype(mx.int32)
        if self._length:
            joined = mx.concatenate([self._history, tokens[:, None]], axis=1)
            self._history = joined[:, 1:]
        for sequence in self.members:
            sequence.written += 1
        return DrawnTokens.of(tokens, own, self.sampling.logprobs)

    def store_histories(self) -> None:
        """Give each sequence its row of the history."""
        if self._length:
            for row, sequence in enumerate(self.members):
                sequence.history = self._history[row]

    def _history_of(self, sequence: SequenceState) -> mx.array:
        if sequence.history is None:
            padded = [-1] * self._length + sequence.ids
            sequence.history = mx.array(padded[-self._length :], mx.int32)
        return sequence.history

    def _constrain(self, logits: mx.array, shaped: mx.array) -> mx.array:
        """Remove the tokens that the members' constraints do not allow."""
        if all(sequence.request.constraint is None for sequence in self.members):
            return shaped
        allowed = np.ones(logits.shape, np.bool_)
        for row, sequence in enumerate(self.members):
            constraint = sequence.request.constraint
            if constraint is None or sequence.has_ended:
                continue
            try:
                allowed[row] = constraint.allowed(logits.shape[-1])
            except Exception as error:  # must not end the other requests
                sequence.error = error
        return keep_allowed(logits, shaped, mx.array(allowed))


def _draw_one(logits: mx.array, key: mx.array) -> mx.array:
    return mx.random.categorical(logits, key=key)


def _draw_as_alone(logits: mx.array, keys: mx.array) -> mx.array:
    """Draw as `choose_tokens` does for a single text.

    MLX uses its random numbers differently with and without a leading axis. This takes
    twice the time of `_draw_one` under `vmap`.
    """
    rows = zip(logits, keys, strict=True)
    return mx.concatenate(
        [mx.random.categorical(row[None], key=key) for row, key in rows]
    )
