"""How the tokens of one call form sequences: positions, attention and cache.

Letters as in `openelm`.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import mlx.core as mx

from mlx_openelm.model.chunk_sizes import SCORES_AT_ONCE
from mlx_openelm.model.joined_heads import Heads
from mlx_openelm.model.kernels import Rotation, attend, rotation_after, rotation_at


class LayerCache(Protocol):
    """The KV cache of one layer; mlx-lm's caches have this interface, too."""

    @property
    def offset(self) -> int | mx.array: ...  # cached tokens, in all or per row (B,)

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]: ...


def _add_to(cache: LayerCache, heads: Heads) -> tuple[mx.array, mx.array]:
    """Add the new keys and values; return all of them, (B, K, S, H) each.

    In one array, where the heads are one and the cache takes it (mlx-lm's do not).
    """
    if heads.joined is not None and hasattr(cache, "update_pair"):
        stored: tuple[mx.array, mx.array] = cache.update_pair(heads.pair)
        return stored
    return cache.update_and_fetch(heads.keys, heads.values)


class TokenLayout(ABC):
    """How the tokens (B, T) of one call form sequences."""

    @abstractmethod
    def rotation(self, H: int, base: float, dtype: mx.Dtype) -> Rotation:
        """Return the rotation of each token to its position, for all layers."""

    @abstractmethod
    def attend(self, heads: Heads, cache: LayerCache | None) -> mx.array:
        """Return the attention output (B, Q, T, H).

        Args:
            cache: receives the new keys and values, if the layout supports one.
        """


@dataclass(frozen=True, slots=True)
class Continuation(TokenLayout):
    """Each row of tokens continues one sequence of the cache.

    Attributes:
        num_tokens: T.
        offset: cached tokens, the same in all sequences or one number each, (B,).
        mask: see `kernels.attend`.
    """

    num_tokens: int
    offset: int | mx.array = 0
    mask: mx.array | str | None = "causal"

    @classmethod
    def after(
        cls, cache: Sequence[LayerCache] | None, num_tokens: int
    ) -> "Continuation":
        """Return the layout of tokens that follow those in the layers' caches."""
        mask: mx.array | str | None = "causal" if num_tokens > 1 else None
        if not cache:
            return cls(num_tokens, 0, mask)
        if hasattr(
            cache[0], "make_mask"
        ):  # a sliding window, or rows unequal in length
            mask = cache[0].make_mask(num_tokens, return_array=False, window_size=None)
        return cls(num_tokens, cache[0].offset, mask)

    def rotation(self, H: int, base: float, dtype: mx.Dtype) -> Rotation:
        return rotation_after(self.offset, self.num_tokens, H, base, dtype)

    def attend(self, heads: Heads, cache: LayerCache | None) -> mx.array:
        keys, values = heads.keys, heads.values
        if cache is not None:
            keys, values = _add_to(cache, heads)  # (B, K, S, H)
        return attend(heads.queries, keys, values, self.mask)


@dataclass(frozen=True, slots=True)
class Sequences(TokenLayout):
    """One row holds sequences of any lengths end to end, without padding.

    Sequences do not attend to each other. A cache receives the keys and values of all
    tokens; what it held before is not attended to.
    """

    lengths: tuple[int, ...]

    def rotation(self, H: int, base: float, dtype: mx.Dtype) -> Rotation:
        positions = [mx.arange(length) for length in self.lengths]
        return rotation_at(mx.concatenate(positions), H, base)

    def attend(self, heads: Heads, cache: LayerCache | None) -> mx.array:
        if cache is not None:
            _add_to(cache, heads)
        ends = list(itertools.accumulate(self.lengths))[:-1]
        kinds = (heads.queries, heads.keys, heads.values)
        split = (mx.split(x, ends, axis=2) for x in kinds)
        parts = [attend(q, k, v, "causal") for q, k, v in zip(*split, strict=True)]
        return mx.concatenate(parts, axis=2)


@dataclass(frozen=True)
class PaddedSequences(TokenLayout):
    """One row holds N tokens, sequences and padding, in arrays of fixed shapes.

    For attention the tokens are moved to R rows of S slots, each with one or more whole
    sequences. The last token is padding, and unused slots repeat it: as nothing depends
    on padding, its gradient is zero, and moving back is the gradient of moving.

    Attributes:
        places: each token's position in its sequence, (N,).
        slots: each token's slot, (N,), all different.
        sources: the token in each slot, (R, S).
        segments: the number of the sequence in each slot, (R, S).
    """

    places: mx.array
    slots: mx.array
    sources: mx.array
    segments: mx.array

    @cached_property
    def mask(self) -> mx.array:
        """Which slots attend to which, (R, 1, S, S); the same in all layers."""
        return _mask_segments(self.segments)

    def rotation(self, H: int, base: float, dtype: mx.Dtype) -> Rotation:
        return rotation_at(self.places, H, base)

    def attend(self, heads: Heads, cache: LayerCache | None) -> mx.array:
        assert cache is None
        R, S = self.segments.shape
        _, Q, _, H = heads.queries.shape
        joined = heads.join().squeeze(0)  # (Q + 2 K, N, H)
        moved = _move(joined, self.sources.reshape(-1), self.slots)
        rows = moved.reshape(-1, R, S, H).swapaxes(0, 1)  # (R, Q + 2 K, S, H)
        own = Heads.of(rows, Q)
        at_once = max(1, SCORES_AT_ONCE // (Q * S * S))
        if at_once >= R:
            attended = attend(own.queries, own.keys, own.values, self.mask)
        else:
            attended = _attend_in_parts(
                own.queries, own.keys, own.values, self.segments, at_once=at_once
            )
        flat = attended.swapaxes(0, 1).reshape(Q, R * S, H)  # from (R, Q, S, H)
        return _move(flat, self.slots, self.sources.reshape(-1))[None]


def _mask_segments(segments: mx.array) -> mx.array:
    """Return the causal mask inside of segments (R, S), (R, 1, S, S)."""
    S = segments.shape[1]
    causal = mx.arange(S)[:, None] >= mx.arange(S)
    return ((segments[:, :, None] == segments[:, None]) & causal)[:, None]


def _attend_in_parts(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    segments: mx.array,
    *,
    at_once: int,
) -> mx.array:
    """Return the attention output (R, Q, S, H); only scores of a few rows exist.

    The gradient computes the scores again, the same rows at a time.
    """
    rows = [slice(i, i + at_once) for i in range(0, segments.shape[0], at_once)]

    @mx.custom_function
    def attend_all(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        parts: list[mx.array] = []
        for part in rows:
            own = mx.depends(queries[part], parts[-1]) if parts else queries[part]
            parts.append(
                attend(own, keys[part], values[part], _mask_segments(segments[part]))
            )
        return mx.concatenate(parts)

    @attend_all.vjp
    def attend_all_vjp(
        primals: tuple[mx.array, mx.array, mx.array],
        cotangent: mx.array,
        output: mx.array,
    ) -> tuple[mx.array, ...]:
        gradients: list[list[mx.array]] = []
        for part in rows:
            own = [x[part] for x in primals]
            if gradients:
                own[0] = mx.depends(own[0], gradients[-1])
            _, gradient = mx.vjp(
                partial(attend, mask=_mask_segments(segments[part])),
                own,
                [cotangent[part]],
            )
            gradients.append(gradient)
        return tuple(mx.concatenate(list(x)) for x in zip(*gradients, strict=True))

    attended: mx.array = attend_all(queries, keys, values)  # type: ignore[assignment] # untyped
    return attended


def _move(x: mx.array, sources: mx.array, targets: mx.array) -> mx.array:
    """Return x[:, sources], whose gradient is moved back by x[:, targets]."""

    @mx.custom_function
    def move(x: mx.array) -> mx.array:
        return mx.take(x, sources, axis=1)

    @move.vjp
    def move_back(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return mx.take(cotangent, targets, axis=1)

    moved: mx.array = move(x)  # type: ignore[assignment] # untyped
    return moved
