"""Batches of samples, without padding.

The sequences of a batch are concatenated to one row of tokens; their lengths limit
attention to each sequence. Logits are computed only at positions with a target.

    N  input tokens of a batch: each sequence up to, but without, its last target
    M  targets of a batch
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_openelm.finetuning.samples import Pair, Sample


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs and targets of one forward pass.

    Attributes:
        tokens: input tokens, int32 (N,).
        lengths: input tokens of each sequence; their sum is N.
        positions: int32 (M,), the inputs after which a target follows.
        targets: int32 (M,), the token that follows each of these positions.
        sequence: int32 (M,), the index of the sequence of each target.
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
    """Return the sample indices of every batch of an epoch, which has each sample once.

    The order depends on seed and epoch alone. The last batch can be smaller.

    Args:
        lengths: tokens of each sample.
        batch_size: number of samples; with `pack_length`, number of rows, each filled
            with whole samples.
        seed, epoch: not negative.
        pack_length: maximum number of tokens in a row.
    """
    # NumPy guarantees that these raw numbers stay the same in all versions, unlike the
    # output of its generators.
    numbers = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    order = np.argsort(numbers.random_raw(len(lengths)), kind="stable").tolist()
    if pack_length is None:
        starts = range(0, len(order), batch_size)
        return [tuple(order[start : start + batch_size]) for start in starts]
    rows = _fill_rows(order, lengths, pack_length)
    return [
        tuple(i for row in rows[start : start + batch_size] for i in row)
        for start in range(0, len(rows), batch_size)
    ]


def _fill_rows(
    order: Sequence[int], lengths: Sequence[int], pack_length: int
) -> list[list[int]]:
    """Pack samples best-fit; a sample longer than `pack_length` has its own row."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (tokens left, row), sorted
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
    """Divide samples into parts of similar size: longest first, to the smallest part.

    The parts are the micro-batches of gradient accumulation and of processes. Each
    keeps the order of `indices`; a part can be empty.

    Args:
        lengths: tokens of all samples, indexed by `indices`.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for place in sorted(range(len(indices)), key=lambda p: -lengths[indices[p]]):
        lightest = loads.index(min(loads))
        shares[lightest].append(place)
        loads[lightest] += lengths[indices[place]]
    return [tuple(indices[place] for place in sorted(share)) for share in shares]


def collate(samples: Sequence[Sample]) -> Batch:
    """Concatenate samples, without the tokens from each sample's last target on."""
    places = [np.flatnonzero(sample.loss_mask) for sample in samples]  # of targets
    assert all(len(p) for p in places), "a sample has no target"
    lengths = [int(p[-1]) for p in places]
    starts = np.cumsum([0, *lengths[:-1]])
    return Batch(
        tokens=_join(s.tokens[:n] for s, n in zip(samples, lengths, strict=True)),
        lengths=tuple(lengths),
        positions=_join(p - 1 + n for p, n in zip(places, starts, strict=True)),
        targets=_join(s.tokens[p] for s, p in zip(samples, places, strict=True)),
        sequence=_join(np.full(len(p), i) for i, p in enumerate(places)),
    )


def collate_pairs(pairs: Sequence[Pair]) -> Batch:
    """Concatenate the chosen answers of all pairs, then the rejected ones."""
    return collate([*(p.chosen for p in pairs), *(p.rejected for p in pairs)])


def _join(arrays: Iterable[npt.NDArray[np.integer]]) -> npt.NDArray[np.int32]:
    return np.concatenate([*arrays]).astype(np.int32)


# Sizes of padded batches, for a compiled update ------------------------------------

MULTIPLE = 64
MOST_PLANNED = 16  # shapes; at most as many again are powers of two


def choose_multiple(most: int) -> int:
    """Return the multiple that batches of at most `most` tokens are padded to."""
    multiple = MULTIPLE
    while most > MOST_PLANNED * multiple:
        multiple *= 2
    return multiple


def round_up(count: int, multiple: int) -> int:
    """Return the smallest multiple that is `count` or more."""
    return -(-count // multiple) * multiple
