"""Prefix sharing: process sequences with common prefixes in one row, each prefix once.

The tokens of all sequences form a tree, split into segments where sequences diverge. A
row is the concatenation of the segments, without padding. Each segment attends to its
ancestors and to itself.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_openelm.model.joined_heads import Heads, JoinedRotation
from mlx_openelm.model.kernels import Rotation, attend, rotation_after
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.token_layout import LayerCache, TokenLayout

Span = tuple[int, int]  # places in the row, the second one excluded


@dataclass(frozen=True, slots=True)
class PrefixTree(TokenLayout):
    """Sequences of tokens in one row.

    Attributes:
        tokens: the N tokens of the row.
        positions: position of each of them in its sequences, (N,).
        segments: for each segment, in the order of the row, the spans of its ancestors
            and itself, from the root down; adjacent spans are joined.
        paths: for each sequence, the spans of its segments.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    segments: tuple[tuple[Span, ...], ...]
    paths: tuple[tuple[Span, ...], ...]

    def place(self, sequence: int, position: int) -> int:
        """Return the place in the row of a sequence's token."""
        for start, end in self.paths[sequence]:
            if position < end - start:
                return start + position
            position -= end - start
        raise IndexError(position)

    def rotation(self, H: int, base: float, dtype: mx.Dtype) -> Rotation:
        positions = mx.array(self.positions)
        # Each token is treated as a sequence of length 1 with its own position.
        turn = rotation_after(positions, 1, H, base, dtype)
        if isinstance(turn, JoinedRotation):
            return JoinedRotation.at(positions, H, base)
        return lambda x: turn(x.swapaxes(0, 1)).swapaxes(0, 2)  # (1, heads, N, H)

    def attend(self, heads: Heads, cache: LayerCache | None) -> mx.array:
        ends = [spans[-1][1] for spans in self.segments]
        queries = mx.split(heads.queries, ends[:-1], axis=2)
        parts = [
            attend(own, _pick(heads.keys, spans), _pick(heads.values, spans), "causal")
            for own, spans in zip(queries, self.segments, strict=True)
        ]
        return mx.concatenate(parts, axis=2)


def build_tree(sequences: Sequence[Sequence[int]]) -> PrefixTree:
    """Return the tree of non-empty sequences in lexicographic order."""
    tokens, positions = list[int](), list[int]()
    segments = list[tuple[Span, ...]]()
    paths: list[tuple[Span, ...]] = [()] * len(sequences)
    # Ranges (first, last) of sequences with a common prefix: its length and spans
    waiting: list[tuple[int, int, int, tuple[Span, ...]]]
    waiting = [(0, len(sequences), 0, ())]
    while waiting:
        first, last, depth, above = waiting.pop()
        # Sorted: the common prefix of the first and the last is that of all.
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
        waiting += reversed(parts)  # the first child directly follows its parent
    return PrefixTree(tuple(tokens), tuple(positions), tuple(segments), tuple(paths))


def count_common(a: Sequence[int], b: Sequence[int], start: int = 0) -> int:
    """Return the length of the common prefix, which is at least `start`."""
    most = min(len(a), len(b))
    return next((i for i in range(start, most) if a[i] != b[i]), most)


def _join(spans: tuple[Span, ...], own: Span) -> tuple[Span, ...]:
    if spans and spans[-1][1] == own[0]:
        return (*spans[:-1], (spans[-1][0], own[1]))
    return (*spans, own)


def read_tree(model: OpenELM, tree: PrefixTree) -> mx.array:
    """Return the normalized hidden states of the row's tokens, (N, D)."""
    return model.transformer(mx.array([tree.tokens]), layout=tree)[0]


def _pick(x: mx.array, spans: Sequence[Span]) -> mx.array:
    """Return the parts of (1, heads, N, H) that a segment attends to."""
    parts = [x[:, :, start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
