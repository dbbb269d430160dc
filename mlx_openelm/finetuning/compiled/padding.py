"""Batches padded to few shapes, for a training step that is compiled.

    N  tokens of a batch, with padding       R, S  rows and slots, for attention
    M  targets of a batch, with padding      P     pairs of a batch, with padding

The shape of a batch depends on the batch and the plan of the run alone, so a resumed
run computes with the same shapes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_openelm.finetuning.batches import (
    MULTIPLE,
    Batch,
    choose_multiple,
    round_up,
)

Arrays = Mapping[str, npt.NDArray[np.int32]]


@dataclass(frozen=True, slots=True)
class PaddedShape:
    """The shape of padded batches: N, M, R, S."""

    tokens: int
    targets: int
    rows: int
    slots: int


class PaddedShapes:
    """The shapes of a run, one for each multiple of tokens.

    Batches that the plan does not cover get shapes that are powers of two.

    Args:
        batches: those of the first steps of the run.
        longest: the most tokens of a sequence.
    """

    def __init__(self, batches: Iterable[Batch], longest: int) -> None:
        self._longest = round_up(longest, MULTIPLE)
        lengths = [(batch.lengths, len(batch.targets)) for batch in batches]
        most = max((sum(each) for each, _ in lengths), default=0) + 1
        self._multiple = choose_multiple(most)
        grouped: dict[int, list[tuple[Sequence[int], int]]] = {}
        for each, targets in lengths:
            grouped.setdefault(self._tokens(each), []).append((each, targets))
        self._planned = {N: _cover(N, group) for N, group in grouped.items()}

    def fit(self, batch: Batch) -> PaddedShape:
        """Return the shape that a batch is padded to."""
        N, M = self._tokens(batch.lengths), len(batch.targets)
        planned = self._planned.get(N)
        if planned is not None and planned.targets >= M:
            rows, S = planned.rows, planned.slots
            if max(batch.lengths) <= S and _count_rows(batch.lengths, S) <= rows:
                return planned
        N = max(MULTIPLE, 1 << sum(batch.lengths).bit_length())
        S = min(N, self._longest)
        return PaddedShape(N, N, 2 * N // S + 1, S)

    def _tokens(self, lengths: Sequence[int]) -> int:
        return round_up(sum(lengths) + 1, self._multiple)  # the last one is padding


def _cover(N: int, group: Sequence[tuple[Sequence[int], int]]) -> PaddedShape:
    """Return a shape that holds all batches (lengths, targets) of a group."""
    S = round_up(max(max(lengths) for lengths, _ in group), MULTIPLE)
    R = max(_count_rows(lengths, S) for lengths, _ in group)
    M = round_up(max(targets for _, targets in group), MULTIPLE)
    return PaddedShape(N, min(M, N), max(R, -(-N // S)), S)


def _count_rows(lengths: Sequence[int], slots: int) -> int:
    return max(row for row, _ in _fill_rows(lengths, slots)) + 1


def _fill_rows(lengths: Sequence[int], slots: int) -> list[tuple[int, int]]:
    """Return the row and first slot of each sequence; the longest are placed first."""
    used: list[int] = []
    placed = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, n in enumerate(used) if n + lengths[i] <= slots), None)
        if row is None:
            row = len(used)
            used.append(0)
        placed[i] = row, used[row]
        used[row] += lengths[i]
    return placed


def pad(batch: Batch, shape: PaddedShape) -> Arrays:
    """Return the arrays of a padded batch, which all have fixed shapes.

    Padding repeats the first tokens of the batch as a sequence that has no target, so
    it is finite where the batch is.
    """
    N, M, R, S = shape.tokens, shape.targets, shape.rows, shape.slots
    count, targets = len(batch.tokens), len(batch.targets)
    first = np.cumsum([0, *batch.lengths[:-1]])
    places = np.arange(count) - np.repeat(first, batch.lengths)
    starts = [row * S + slot for row, slot in _fill_rows(batch.lengths, S)]
    slots = np.repeat(starts, batch.lengths) + places
    sources = np.full(R * S, N - 1)
    sources[slots] = np.arange(count)
    free = np.flatnonzero(sources == N - 1)[: N - count]
    sources[free] = np.arange(count, N)
    segments = np.full(R * S, -1)
    segments[slots] = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    repeated = np.arange(N - count) % count

    def with_zeros(values: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        return np.pad(values, (0, M - targets))

    arrays = {
        "tokens": np.concatenate([batch.tokens, batch.tokens[repeated]]),
        "places": np.concatenate([places, places[repeated]]),
        "slots": np.concatenate([slots, free]),
        "sources": sources.reshape(R, S),
        "segments": segments.reshape(R, S),
        "positions": np.pad(batch.positions, (0, M - targets), constant_values=N - 1),
        "targets": with_zeros(batch.targets),
        "sequence": with_zeros(batch.sequence),
        "is_target": np.arange(M) < targets,
    }
    return {name: array.astype(np.int32) for name, array in arrays.items()}
