"""Sequences that begin alike are read in one row, and what they share only once.

The tokens of all sequences form a tree, cut into segments where sequences part. A row
holds the segments end to end: nothing is padded and the matrix products see one long
row. Each segment attends to those above it and to itself.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_openelm.model.kernels import Rotation, attend, rotation_after
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.token_layout import LayerCache, TokenLayout

Span = tuple[int, int]  # places in the row, the second one excluded


@dataclass(frozen=True, slots=True)
class PrefixTree(TokenLayout):
    """Sequences of tokens in one row.

    Attributes:
        tokens: of the row, N of them.
        positions: the place of each of them in its sequences, (N,).
        segments: where each segment and those above it stand in the row, from the top
            down; neighbours are joined. The segments come in the order of the row.
        paths: the same for each sequence: its whole way through the row.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    segments: tuple[tuple[Span, ...], ...]
    paths: tuple[tuple[Span, ...], ...]

    def place(self, sequence: int, position: int) -> int:
        """Return where a token of a sequence stands in the row."""
        for start, end in self.paths[sequence]:
            if position < end - start:
                return start + position
            position -= end - start
        raise IndexError(position)

    def rotation(self, H: int, base: float, dtype: mx.Dtype) -> Rotation:
        # Every token is taken for a sequence of its own, since each has its place.
        turn = rotation_after(mx.array(self.positions), 1, H, base, dtype)
        return lambda x: turn(x.swapaxes(0, 1)).swapaxes(0, 2)  # (1, heads, N, H)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: LayerCache | None,
    ) -> mx.array:
        ends = [spans[-1][1] for spans in self.segments]
        parts = [
            attend(own, _pick(keys, spans), _pick(values, spans), "causal")
            for own, spans in zip(
                mx.split(queries, ends[:-1], axis=2), self.segments, strict=True
            )
        ]
        return mx.concatenate(parts, axis=2)


def build_tree(sequences: Sequence[Sequence[int]]) -> PrefixTree:
    """Return the tree of sequences, none of them empty, in lexicographic order."""
    tokens, positions = list[int](), list[int]()
    segments = list[tuple[Span, ...]]()
    paths: list[tuple[Span, ...]] = [()] * len(sequences)
    # Sequences (first, last) that agree up to a depth, and where that stands in the row
    waiting: list[tuple[int, int, int, tuple[Span, ...]]]
    waiting = [(0, len(sequences), 0, ())]
    while waiting:
        first, last, depth, above = waiting.pop()
        # In this order, what the first and the last one share is shared by all.
        end = count_common(sequences[first], sequences[last - 1], depth)
        if end > depth:
            own = (len(tokens), len(tokens) + end - depth)
            tokens += sequences[first][depth:end]
            positions += range(depth, end)
            above = _join(above, own)
            segments.append(above)
        while first < last and len(sequences[first]) == end:
            paths[first] = above
            first += 1
        parts = []
        for _, group in itertools.groupby(
            range(first, last), key=lambda i: sequences[i][end]
        ):
            members = list(group)
            parts.append((members[0], members[-1] + 1, end, above))
        waiting += reversed(parts)  # so that a first child stands behind its parent
    return PrefixTree(tuple(tokens), tuple(positions), tuple(segments), tuple(paths))


def count_common(a: Sequence[int], b: Sequence[int], start: int = 0) -> int:
    """Return how many tokens are the same, if the first `start` ones are."""
    most = min(len(a), len(b))
    return next((i for i in range(start, most) if a[i] != b[i]), most)


def _join(spans: tuple[Span, ...], own: Span) -> tuple[Span, ...]:
    if spans and spans[-1][1] == own[0]:
        return (*spans[:-1], (spans[-1][0], own[1]))
    return (*spans, own)


def read_tree(model: OpenELM, tree: PrefixTree) -> mx.array:
    """Return the normed hidden states of the row's tokens, (N, D)."""
    return model.transformer(mx.array([tree.tokens]), layout=tree)[0]


def _pick(x: mx.array, spans: Sequence[Span]) -> mx.array:
    """Return the parts of (1, heads, N, H) that a segment sees."""
    parts = [x[:, :, start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
