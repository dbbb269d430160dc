"""The heads of a layer; on a GPU, their norms and RoPE in one elementwise operation.

Letters as in `openelm`; h is H / 2. RoPE rotates the pairs (i, i + h), so a head is two
halves, (2, h), and each half of the result is a weighted sum of both.
"""

from dataclasses import dataclass
from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

Pair = tuple[mx.array, mx.array]


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of a layer; queries and keys are normalised and rotated.

    Attributes:
        queries: (B, Q, T, H).
        keys: (B, K, T, H), as the values.
        joined: all heads in one array, (B, Q + 2 K, T, H), of which the others are
            views; None if there is no such array.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    joined: mx.array | None = None

    @classmethod
    def of(cls, joined: mx.array, num_query_heads: int) -> "Heads":
        """Return views of all heads in one array."""
        Q = num_query_heads
        queries, keys, values = mx.split(joined, [Q, (Q + joined.shape[1]) // 2], 1)
        return cls(queries, keys, values, joined)

    def join(self) -> mx.array:
        """Return all heads in one array, (B, Q + 2 K, T, H)."""
        if self.joined is None:
            return mx.concatenate([self.queries, self.keys, self.values], axis=1)
        return self.joined

    @property
    def pair(self) -> mx.array:
        """Keys and values in one array, (2, B, K, T, H)."""
        if self.joined is None:
            return mx.stack([self.keys, self.values])
        pair = self.joined[:, self.queries.shape[1] :]  # (B, 2 K, T, H)
        return mx.unflatten(pair, 1, (2, -1)).swapaxes(0, 1)


@dataclass(frozen=True, slots=True)
class JoinedRotation:
    """Norms and RoPE of all heads of a layer, for tokens at fixed positions.

    Attributes:
        factors: of the first and of the second input half in both halves of the result,
            float32 (1 or B, 1, T, 2, h); they are those of all layers.
        inverse: the factors of the inverse rotation.
    """

    factors: Pair
    inverse: Pair

    @classmethod
    def at(cls, positions: mx.array, H: int, base: float) -> "JoinedRotation":
        """Return the rotation of tokens at the given positions, (T,) or (B, T)."""
        frequencies = mx.power(base, mx.arange(0, H, 2) / -H)  # (h,)
        rows = positions[None] if positions.ndim == 1 else positions
        angles = rows[:, None, :, None, None] * frequencies
        cos, sin = mx.cos(angles), mx.sin(angles)  # (1 or B, 1, T, 1, h)
        first, second = mx.array([[1.0], [0.0]]), mx.array([[0.0], [1.0]])  # (2, 1)
        return cls(
            (cos * first + sin * second, cos * second - sin * first),
            (cos * first - sin * second, cos * second + sin * first),
        )

    def __call__(
        self,
        qkv: mx.array,
        q_norm: nn.RMSNorm,
        k_norm: nn.RMSNorm,
        num_query_heads: int,
    ) -> Heads:
        """Return the heads of qkv (B, T, Q + 2 K, H)."""
        # Also of the values, where it is not used, so that all heads stay one array
        normed = mx.fast.rms_norm(qkv, None, q_norm.eps)
        heads = (x.swapaxes(1, 2) for x in (qkv, normed))  # (B, Q + 2 K, T, H)
        halves = (mx.unflatten(x, -1, (2, -1)) for x in heads)  # (B, Q + 2 K, T, 2, h)
        norms = (q_norm, k_norm)
        weights = (mx.unflatten(norm.weight, 0, (2, -1)) for norm in norms)  # (2, h)
        kinds = _kinds(qkv.shape[2], num_query_heads)
        rotate = _rotate_in_training if q_norm.training else _rotate
        joined = rotate(self, kinds, *halves, *weights)  # (B, Q + 2 K, T, 2, h)
        return Heads.of(joined.flatten(-2), num_query_heads)


@cache
def _kinds(num_heads: int, num_query_heads: int) -> Pair:
    """Return which heads are queries, and which are values, (Q + 2 K, 1, 1, 1)."""
    heads = np.arange(num_heads)[:, None, None, None]
    first_value = (num_query_heads + num_heads) // 2
    kinds = mx.array(heads < num_query_heads), mx.array(heads >= first_value)
    mx.eval(kinds)
    return kinds


def _rotate(
    rotation: JoinedRotation,
    kinds: Pair,
    raw: mx.array,
    normed: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
) -> mx.array:
    """Return rotated queries and keys, and the raw values, (B, Q + 2 K, T, 2, h)."""
    others = normed, q_weight, k_weight
    halves = [half for x in others for half in mx.split(x, 2, axis=-2)]  # (..., 1, h)
    return _rotate_elements(*[raw, *kinds, *halves, *rotation.factors])


def _rotate_in_training(
    rotation: JoinedRotation,
    kinds: Pair,
    raw: mx.array,
    normed: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
) -> mx.array:
    """Return `_rotate`, whose gradient is elementwise, too."""
    rotate = mx.custom_function(partial(_rotate, rotation, kinds))

    @rotate.vjp
    def rotate_back(
        primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array
    ) -> tuple[mx.array, ...]:
        _, normed, q_weight, k_weight = primals
        is_query, is_value = kinds
        halves = mx.split(cotangent, 2, axis=-2)  # (B, Q + 2 K, T, 1, h)
        parts = zip(halves, rotation.inverse, strict=True)
        first, second = (half * factors for half, factors in parts)
        back = first + second  # float32
        weight = mx.where(is_query, q_weight, k_weight)
        d_normed = mx.where(is_value, 0, back * weight).astype(normed.dtype)
        # Not computed unless the norms are trained
        d_weights = (
            mx.where(own, back * normed, 0).sum(axis=(0, 1, 2)).astype(q_weight.dtype)
            for own in (is_query, mx.logical_not(is_query | is_value))
        )
        return mx.where(is_value, cotangent, 0), d_normed, *d_weights

    rotated: mx.array = rotate(raw, normed, q_weight, k_weight)  # type: ignore[assignment] # untyped
    return rotated


def _rotate_plain(
    raw: mx.array,
    is_query: mx.array,
    is_value: mx.array,
    normed_1: mx.array,
    normed_2: mx.array,
    q_weight_1: mx.array,
    q_weight_2: mx.array,
    k_weight_1: mx.array,
    k_weight_2: mx.array,
    factors_1: mx.array,
    factors_2: mx.array,
) -> mx.array:
    """Return `_rotate` from first halves of heads (..., 1, h), _1, and second, _2."""
    first = normed_1 * mx.where(is_query, q_weight_1, k_weight_1)
    second = normed_2 * mx.where(is_query, q_weight_2, k_weight_2)
    rotated = first * factors_1 + second * factors_2
    return mx.where(is_value, raw, rotated.astype(raw.dtype))


_rotate_elements = mx.compile(_rotate_plain, shapeless=True)
