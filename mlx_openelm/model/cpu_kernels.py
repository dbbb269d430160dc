"""Faster operations for the Linux CPU, where MLX has no fused kernels.

Measured: exp takes 19 ns per element, a power of two 6 ns. Large tensors therefore use
powers of two, with explicit gradients that need less memory and fewer passes. Small
tensors use as few operations as possible. mx.compile is not used: on the CPU it runs
the C++ compiler, which takes seconds. Letters as in `kernels`; t and s are the queries
and keys of one chunk.
"""

import math
from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from mlx_openelm import openblas
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.model.chunk_sizes import QUERIES

LOG2_E = math.log2(math.e)
FEW_TOKENS = 32  # up to this number, RoPE is a product with a matrix
FEW_NUMBERS = 2**15  # up to this size, operations cost more than arithmetic
FEW_EXPONENTIALS = 2**11  # up to this number, exp is as fast as a power of two
FEW_PARAMETERS = 5 * 10**7  # up to this size, one thread is as fast as two


def normalize(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return the RMSNorm of a small tensor, in elementary operations."""
    return x * mx.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def rotate_by_matrix(x: mx.array, matrix: mx.array) -> mx.array:
    """Apply RoPE to x (B, T, heads, H) by one product; return (B, heads, T, H)."""
    return (x @ matrix.astype(x.dtype)).swapaxes(1, 2)


def rotation_matrix(positions: mx.array, H: int, base: float) -> mx.array:
    """Return the RoPE matrices of the positions, (T, H, H) or (B, T, H, H)."""
    frequencies, identity, crossed = _rotation_constants(H, base)
    angles = positions[..., None, None] * frequencies  # (..., T, 1, H)
    matrix = mx.cos(angles) * identity + mx.sin(angles) * crossed  # (..., T, H, H)
    return matrix.reshape(H, H) if positions.size == 1 else matrix


@cache
def _rotation_constants(H: int, base: float) -> tuple[mx.array, mx.array, mx.array]:
    """Return the frequencies (H,), the identity and the crossed identity (H, H)."""
    frequencies = mx.power(base, mx.arange(0, H, 2) / -H)  # (H / 2,)
    one, zero = mx.eye(H // 2), mx.zeros((H // 2, H // 2))
    crossed = mx.concatenate(
        [mx.concatenate([zero, one], axis=1), mx.concatenate([-one, zero], axis=1)]
    )
    constants = mx.concatenate([frequencies, frequencies]), mx.eye(H), crossed
    mx.eval(constants)
    return constants


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up, all of shape (B, T, F)."""
    if gate.shape[-2] > 1:
        out: mx.array = _trained_swiglu(gate, up)  # type: ignore[assignment] # untyped
        return out
    if gate.size > FEW_EXPONENTIALS:
        return _swiglu_by_powers(gate, up)
    return gate * mx.sigmoid(gate) * up


def _swiglu_by_powers(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up / (1 + mx.power(2.0, gate * -LOG2_E))


_trained_swiglu = mx.custom_function(_swiglu_by_powers)


@_trained_swiglu.vjp
def _trained_swiglu_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    gate, up = primals
    sigmoid = 1 / (1 + mx.power(2.0, gate * -LOG2_E))
    silu = gate * sigmoid
    return cotangent * up * (sigmoid + silu * (1 - sigmoid)), cotangent * silu


def attend_one_query(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None
) -> mx.array:
    """Return the attention output (B, Q, 1, H) of one query per sequence."""
    B, Q, _, H = queries.shape
    K = keys.shape[1]
    by_powers = B * Q * keys.shape[2] > FEW_EXPONENTIALS
    scale = H**-0.5 * (LOG2_E if by_powers else 1)
    scores = (queries * scale).reshape(B, K, Q // K, H) @ keys.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)  # (B, K, Q / K, S)
    if by_powers:
        weights = mx.power(2.0, scores - scores.max(axis=-1, keepdims=True))
        attended = (weights @ values) / weights.sum(axis=-1, keepdims=True)
    else:
        attended = mx.softmax(scores, axis=-1) @ values  # (B, K, Q / K, H)
    return attended.reshape(B, Q, 1, H)


def attend_causally(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Return the attention output (B, Q, T, H); the last query attends to all keys."""
    attended: mx.array
    attended, _ = _attend_causally(queries, keys, values)  # type: ignore[misc] # untyped
    return attended


@mx.custom_function
def _attend_causally(
    queries: mx.array, keys: mx.array, values: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the attention output (B, Q, T, H) and log2 of the softmax sums (B, Q, T).

    Scores are computed for `QUERIES` queries at a time. The gradient uses the sums.
    """
    B, Q, T, H = queries.shape
    S = keys.shape[2]
    attended, log_sums = [], []
    for start in range(0, T, QUERIES):
        end = min(start + QUERIES, T)
        visible = S - T + end
        scores = _compute_scores(queries[:, :, start:end], keys[:, :, :visible])
        largest = scores.max(axis=-1, keepdims=True)
        weights = mx.power(2.0, scores - largest)  # (B, K, Q / K * t, s)
        total = weights.sum(axis=-1, keepdims=True)
        part = (weights @ values[:, :, :visible]) / total  # (B, K, Q / K * t, H)
        attended.append(part.reshape(B, Q, end - start, H))
        log_sums.append((largest + mx.log2(total)).reshape(B, Q, end - start))
    return _join(attended, axis=2), _join(log_sums, axis=2)


@_attend_causally.vjp
def _attend_causally_vjp(
    primals: tuple[mx.array, mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array],
    outputs: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array, mx.array]:
    """Recompute the softmax weights from their sums, which saves memory.

    With weights P, output O = P V and its cotangent dO, the gradient of the scores is
    P * (dO V^T - rowsum(dO * O)), as in FlashAttention (2205.14135, appendix B.2).
    """
    (queries, keys, values), (attended, log_sums) = primals, outputs
    cotangent, _ = cotangents
    B, Q, T, H = queries.shape
    K, S = keys.shape[1:3]
    row_sums = (cotangent * attended).sum(axis=-1)  # (B, Q, T)
    query_parts = []
    key_gradient, value_gradient = mx.zeros_like(keys), mx.zeros_like(values)
    for start in range(0, T, QUERIES):
        end = min(start + QUERIES, T)
        visible = S - T + end
        rows = Q // K * (end - start)
        scores = _compute_scores(queries[:, :, start:end], keys[:, :, :visible])
        log_sum = log_sums[:, :, start:end].reshape(B, K, rows, 1)
        weights = mx.power(2.0, scores - log_sum)  # (B, K, rows, s)
        d_out = cotangent[:, :, start:end].reshape(B, K, rows, H)
        d_weights = d_out @ values[:, :, :visible].swapaxes(-1, -2)  # (B, K, rows, s)
        row_sum = row_sums[:, :, start:end].reshape(B, K, rows, 1)
        d_scores = weights * (d_weights - row_sum)
        d_queries = (d_scores @ keys[:, :, :visible]) * H**-0.5  # (B, K, rows, H)
        query_parts.append(d_queries.reshape(B, Q, end - start, H))
        scaled = queries[:, :, start:end].reshape(B, K, rows, H) * H**-0.5
        d_keys = d_scores.swapaxes(-1, -2) @ scaled  # (B, K, s, H)
        d_values = weights.swapaxes(-1, -2) @ d_out  # (B, K, s, H)
        if visible == S == end - start:
            key_gradient, value_gradient = d_keys, d_values
        else:
            key_gradient = key_gradient.at[:, :, :visible].add(d_keys)
            value_gradient = value_gradient.at[:, :, :visible].add(d_values)
    return _join(query_parts, axis=2), key_gradient, value_gradient


def _compute_scores(queries: mx.array, keys: mx.array) -> mx.array:
    """Return causal scores (B, K, Q / K * T, S) in base 2; later keys have -inf."""
    B, Q, T, H = queries.shape
    K, S = keys.shape[1:3]
    grouped = (queries * (LOG2_E * H**-0.5)).reshape(B, K, Q // K * T, H)
    scores = grouped @ keys.swapaxes(-1, -2)
    causal = mx.arange(S) <= mx.arange(S - T, S)[:, None]  # (T, S)
    scores = mx.where(causal, scores.reshape(B, K, Q // K, T, S), -mx.inf)
    return scores.reshape(B, K, Q // K * T, S)


def _join(parts: Sequence[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=axis)


def softmax_parts(
    hidden: mx.array, head: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return what `kernels.softmax_parts` returns."""
    logits = (hidden * LOG2_E) @ head.T  # (M, V), in base 2
    largest = logits.max(axis=-1, keepdims=True)
    powers = mx.power(2.0, logits - largest)
    total = powers.sum(axis=-1, keepdims=True)
    log_z = (largest + mx.log2(total))[:, 0] / LOG2_E
    return powers, total, log_z


def use_decoding_threads(config: OpenELMConfig) -> None:
    """Use one thread for the matrix products of a small model, else all."""
    openblas.use_threads(1 if _count_parameters(config) < FEW_PARAMETERS else None)


@cache
def _count_parameters(config: OpenELMConfig) -> int:
    return config.num_parameters
