"""SwiGLU, rotation, attention and loss, each in the form a back end is quickest with.

On a GPU these are MLX's fused kernels. On the CPU mx.compile would call the C++
compiler before the first token, and exp costs 19 ns an element where a power of two
costs 6 (measured on Linux); so what is large is computed with powers of two there, and
its gradient is written out: it keeps less in memory and passes fewer times over it.
"""

import math
from collections.abc import Sequence
from functools import partial

import mlx.core as mx

LOG2_E = math.log2(math.e)
QUERIES = 256  # at a time: the scores of more would not stay in the CPU's cache


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
        mask: "causal" (the last query sees all keys), None, or what MLX takes.
    """
    H = queries.shape[-1]
    if _on_gpu() or mask != "causal" or queries.dtype != mx.float32:
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=H**-0.5, mask=mask
        )
    attended: mx.array
    attended, _ = _attend_causally(queries, keys, values)  # type: ignore[misc]
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
