"""SwiGLU, rotation, attention and loss, each in the form a back end is quickest with.

On a GPU these are MLX's fused kernels. On the CPU mx.compile would call the C++
compiler before the first token, and exp costs 19 ns an element where a power of two
costs 6 (measured on Linux); so what is large is computed with powers of two there, and
its gradient is written out: it keeps less in memory and passes fewer times over it.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import mlx.core as mx

LOG2_E = math.log2(math.e)
FEW = 32  # tokens: as many are rotated by a matrix
SMALL = 2**15  # numbers: of so few, the operations cost more than the arithmetic
QUERIES = 256  # at a time: the scores of more would not stay in the CPU's cache


def normalize(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return x / sqrt(mean(x^2) + eps) * weight, over the last axis.

    Args:
        x: (..., D), or (..., heads, H) with a weight (heads, H).
    """
    if _on_gpu() or x.dtype != mx.float32 or x.size > SMALL:
        if weight.ndim == 1:
            return mx.fast.rms_norm(x, weight, eps)
        return mx.fast.rms_norm(x, None, eps) * weight
    return x * mx.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


# RoPE (Su et al., 2104.09864) ----------------------------------------------------

# Turns queries or keys (B, T, heads, H) to where they stand: (B, heads, T, H).
Rotation = Callable[[mx.array], mx.array]


def rotation_after(
    offset: int | mx.array, num_tokens: int, H: int, base: float, dtype: mx.Dtype
) -> Rotation:
    """Return the rotation of `num_tokens` behind `offset` others, for all layers.

    Args:
        offset: of all sequences, or of each one, (B,).
    """
    if _on_gpu() or dtype != mx.float32:
        return partial(_rotate_fused, H=H, base=base, offset=offset)
    if isinstance(offset, mx.array) and offset.ndim == 1:
        offset = offset[:, None]
    return rotation_at(offset + mx.arange(num_tokens), H, base)


def rotation_at(positions: mx.array, H: int, base: float) -> Rotation:
    """Return the rotation of tokens at positions (T,) or (B, T)."""
    if positions.size <= FEW:
        return partial(_rotate_by_matrix, matrix=_rotation_matrix(positions, H, base))
    speeds = mx.power(base, mx.arange(0, H, 2) / -H)
    angles = positions[..., None, None] * speeds
    return partial(_rotate_pairs, cos=mx.cos(angles), sin=mx.sin(angles))


def _rotate_fused(x: mx.array, H: int, base: float, offset: int | mx.array) -> mx.array:
    return mx.fast.rope(
        x.swapaxes(1, 2), H, traditional=False, base=base, scale=1.0, offset=offset
    )


def _rotate_pairs(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    a, b = mx.split(x, 2, axis=-1)
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    turned = mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.swapaxes(1, 2)


def _rotate_by_matrix(x: mx.array, matrix: mx.array) -> mx.array:
    return (x @ matrix.astype(x.dtype)).swapaxes(1, 2)


def _rotation_matrix(positions: mx.array, H: int, base: float) -> mx.array:
    """Return (T, H, H) or (B, T, H, H), so that a rotation is one product."""
    speeds, same, crossed = _rotation_constants(H, base)
    angles = positions[..., None, None] * speeds  # (T, 1, H)
    matrix = mx.cos(angles) * same + mx.sin(angles) * crossed
    return matrix.reshape(H, H) if positions.size == 1 else matrix


@cache
def _rotation_constants(H: int, base: float) -> tuple[mx.array, mx.array, mx.array]:
    speeds = mx.power(base, mx.arange(0, H, 2) / -H)
    one, none = mx.eye(H // 2), mx.zeros((H // 2, H // 2))
    crossed = mx.concatenate(
        [mx.concatenate([none, one], axis=1), mx.concatenate([-one, none], axis=1)]
    )
    constants = mx.concatenate([speeds, speeds]), mx.eye(H), crossed
    mx.eval(constants)
    return constants


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up, all of one shape (B, T, F)."""
    if _on_gpu():
        return _fused_swiglu(gate, up)
    if gate.shape[-2] == 1:  # one token: fewer operations count for more
        return gate * mx.sigmoid(gate) * up
    out: mx.array = _plain_swiglu(gate, up)  # type: ignore[assignment] # untyped
    return out


@partial(mx.compile, shapeless=True)
def _fused_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


@mx.custom_function
def _plain_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up / (1 + mx.power(2.0, gate * -LOG2_E))


@_plain_swiglu.vjp
def _plain_swiglu_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    gate, up = primals
    sigmoid = 1 / (1 + mx.power(2.0, gate * -LOG2_E))
    silu = gate * sigmoid
    return cotangent * up * (sigmoid + silu * (1 - sigmoid)), cotangent * silu


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None
) -> mx.array:
    """Return softmax(queries keys^T / sqrt(H)) values, (B, Q, T, H).

    Args:
        queries: (B, Q, T, H); keys and values are (B, K, S, H), shared by Q / K heads.
        mask: "causal" (the last query sees all keys), None, or bool: what is seen.
    """
    B, Q, T, H = queries.shape
    if _on_gpu() or queries.dtype != mx.float32:
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=H**-0.5, mask=mask
        )
    if T == 1 and not isinstance(mask, str):
        K = keys.shape[1]
        grouped = (queries * H**-0.5).reshape(B, K, Q // K, H)
        scores = grouped @ keys.swapaxes(-1, -2)  # (B, K, Q / K, S)
        if mask is not None:
            scores = mx.where(mask, scores, -mx.inf)
        return (mx.softmax(scores, axis=-1) @ values).reshape(B, Q, 1, H)
    if mask != "causal":
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=H**-0.5, mask=mask
        )
    attended: mx.array
    attended, _ = _attend_causally(queries, keys, values)  # type: ignore[misc] # untyped
    return attended


@mx.custom_function
def _attend_causally(
    queries: mx.array, keys: mx.array, values: mx.array
) -> tuple[mx.array, mx.array]:
    """Return what is attended to (B, Q, T, H), and log2 of the weights' sums."""
    B, Q, T, H = queries.shape
    S = keys.shape[2]
    attended, sums = [], []
    for start in range(0, T, QUERIES):
        end = min(start + QUERIES, T)
        seen = S - T + end
        scores = _score(queries[:, :, start:end], keys[:, :, :seen])
        largest = scores.max(axis=-1, keepdims=True)
        weights = mx.power(2.0, scores - largest)  # (B, K, Q / K * t, s)
        total = weights.sum(axis=-1, keepdims=True)
        part = (weights @ values[:, :, :seen]) / total
        attended.append(part.reshape(B, Q, end - start, H))
        sums.append((largest + mx.log2(total)).reshape(B, Q, end - start))
    return _join(attended, axis=2), _join(sums, axis=2)


@_attend_causally.vjp
def _attend_causally_vjp(
    primals: tuple[mx.array, mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array],
    outputs: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array, mx.array]:
    """Weigh again, from the sums that were kept: the weights themselves were not."""
    (queries, keys, values), cotangent, (attended, sums) = (
        primals,
        cotangents[0],
        outputs,
    )
    B, Q, T, H = queries.shape
    K, S = keys.shape[1:3]
    along = (cotangent * attended).sum(axis=-1)  # (B, Q, T)
    query_parts = []
    key_gradient, value_gradient = mx.zeros_like(keys), mx.zeros_like(values)
    for start in range(0, T, QUERIES):
        end = min(start + QUERIES, T)
        seen = S - T + end
        rows = Q // K * (end - start)
        scores = _score(queries[:, :, start:end], keys[:, :, :seen])
        weights = mx.power(2.0, scores - sums[:, :, start:end].reshape(B, K, rows, 1))
        arriving = cotangent[:, :, start:end].reshape(B, K, rows, H)
        moved = arriving @ values[:, :, :seen].swapaxes(-1, -2)
        moved = weights * (moved - along[:, :, start:end].reshape(B, K, rows, 1))
        part = (moved @ keys[:, :, :seen]) * H**-0.5
        query_parts.append(part.reshape(B, Q, end - start, H))
        asked = queries[:, :, start:end].reshape(B, K, rows, H) * H**-0.5
        for_keys = moved.swapaxes(-1, -2) @ asked
        for_values = weights.swapaxes(-1, -2) @ arriving
        if seen == S == end - start:
            key_gradient, value_gradient = for_keys, for_values
        else:
            key_gradient = key_gradient.at[:, :, :seen].add(for_keys)
            value_gradient = value_gradient.at[:, :, :seen].add(for_values)
    return _join(query_parts, axis=2), key_gradient, value_gradient


def _score(queries: mx.array, keys: mx.array) -> mx.array:
    """Return scores in powers of two (B, K, Q / K * T, S), -inf behind a query."""
    B, Q, T, H = queries.shape
    K, S = keys.shape[1:3]
    grouped = (queries * (LOG2_E * H**-0.5)).reshape(B, K, Q // K * T, H)
    scores = grouped @ keys.swapaxes(-1, -2)
    visible = mx.arange(S) <= mx.arange(S - T, S)[:, None]  # (T, S)
    scores = mx.where(visible, scores.reshape(B, K, Q // K, T, S), -mx.inf)
    return scores.reshape(B, K, Q // K * T, S)


def _join(parts: Sequence[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=axis)


def _on_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu
