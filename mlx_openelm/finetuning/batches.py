"""Samples become batches without a token of padding.

Sequences stand end to end in one row of tokens; their lengths tell the model where
attention ends. Only positions with a target get logits.

    N  input tokens of a batch: each sequence up to its last target, which is not read
    M  positions that count
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_openelm.finetuning.samples import Pair, Sample


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass reads, and what it should find.

    Attributes:
        tokens: int32 (N,).
        lengths: of the sequences, in input tokens; their sum is N.
        positions: int32 (M,), the rows of N whose logits count.
        targets: int32 (M,), the token behind each of these.
        sequence: int32 (M,), the number of the sequence that each belongs to.
    """

    tokens: npt.NDArray[np.int32]
    lengths: tuple[int, ...]
    positions: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    sequence: npt.NDArray[np.int32]


def plan_epoch(
    lengths: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    pack_length: int | None = None,
) -> list[tuple[int, ...]]:
    """Return the indices of every batch of an epoch; each sample is in it once.

    The order depends on seed and epoch alone. The last batch may be smaller.

    Args:
        lengths: of the samples, in tokens.
        batch_size: samples, or with `pack_length` rows of so many tokens at most, each
            filled with whole samples.
        seed, epoch: not negative.
    """
    # Sorting raw numbers: NumPy keeps these the same in all its versions, and not what
    # its generators make of them.
    numbers = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    order = np.argsort(numbers.random_raw(len(lengths)), kind="stable").tolist()
    rows = [[i] for i in order]
    if pack_length is not None:
        rows = _fill_rows(order, lengths, pack_length)
    return [
        tuple(i for row in rows[start : start + batch_size] for i in row)
        for start in range(0, len(rows), batch_size)
    ]


def _fill_rows(
    order: Sequence[int], lengths: Sequence[int], pack_length: int
) -> list[list[int]]:
    """Put each sample in the row that it fills best; one too long gets its own."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (tokens left, row), in this order
    smallest = min(lengths, default=0)
    for i in order:
        at = bisect.bisect_left(open_rows, (lengths[i], -1))
        if at < len(open_rows):
            left, row = open_rows.pop(at)
        else:
            left, row = pack_length, len(rows)
            rows.append([])
        rows[row].append(i)
        if left - lengths[i] >= smallest:
            bisect.insort(open_rows, (left - lengths[i], row))
    return rows


def share_out(
    indices: Sequence[int], lengths: Sequence[int], parts: int
) -> list[tuple[int, ...]]:
    """Share samples out by tokens: the longest first, each to who has the least.

    Used for the micro-batches of accumulation, and for machines. A part may be empty;
    within one, the order is that of `indices`.

    Args:
        lengths: of all samples, in tokens; `indices` point into it.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for place in sorted(range(len(indices)), key=lambda p: -lengths[indices[p]]):
        lightest = loads.index(min(loads))
        shares[lightest].append(place)
        loads[lightest] += lengths[indices[place]]
    return [tuple(indices[place] for place in sorted(share)) for share in shares]


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples end to end; behind a sample's last target there is no work."""
    at = [np.flatnonzero(sample.counts) for sample in samples]
    assert all(len(found) for found in at), "a sample has nothing to learn"
    lengths = [int(found[-1]) for found in at]
    starts = np.cumsum([0, *lengths[:-1]])
    return Batch(
        tokens=_join(s.tokens[:n] for s, n in zip(samples, lengths, strict=True)),
        lengths=tuple(lengths),
        positions=_join(found - 1 + n for found, n in zip(at, starts, strict=True)),
        targets=_join(s.tokens[found] for s, found in zip(samples, at, strict=True)),
        sequence=_join(np.full(len(found), i) for i, found in enumerate(at)),
    )


def collate_pairs(pairs: Sequence[Pair]) -> Batch:
    """Put the chosen answers of all pairs first, and all rejected ones behind them."""
    return collate([*(p.chosen for p in pairs), *(p.rejected for p in pairs)])


def _join(arrays: Iterable[npt.NDArray[np.integer]]) -> npt.NDArray[np.int32]:
    return np.concatenate([*arrays]).astype(np.int32)
