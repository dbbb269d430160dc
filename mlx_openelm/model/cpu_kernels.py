"""What makes OpenELM faster on the Linux CPU, where MLX has no fused kernels.

Measured there: exp costs 19 ns an element and a power of two costs 6, so large tensors
use powers of two, with written-out gradients that keep less in memory and take fewer
passes. mx.compile is not used: on the CPU it calls the C++ compiler, for seconds. Small
tensors use as few operations as possible. Letters as in `kernels`.
"""

import math
from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from mlx_openelm import openblas
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.model.chunk_sizes import QUERIES

LOG2_E = math.log2(math.e)
FEW_TOKENS = 32  # up to so many are rotated by a matrix
FEW_NUMBERS = 2**15  # up to so many, operations cost more than arithmetic
FEW_PARAMETERS = 5 * 10**7  # up to so many are read by one thread as quickly as by two


def normalize(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return RMSNorm of a few numbers, in elementary operations."""
    return x * mx.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def rotate_by_matrix(x: mx.array, matrix: mx.array) -> mx.array:
    """Return (B, heads, T, H) of x (B, T, heads, H), rotated by one product."""
    return (x @ matrix.astype(x.dtype)).swapaxes(1, 2)


def rotation_matrix(positions: mx.array, H: int, base: float) -> mx.array:
    """Return (T, H, H) or (B, T, H, H), so that a rotation is one product."""
    frequencies, same, crossed = _rotation_constants(H, base)
    angles = positions[..., None, None] * frequencies  # (T, 1, H)
    matrix = mx.cos(angles) * same + mx.sin(angles) * crossed
    return matrix.reshape(H, H) if positions.size == 1 else matrix


@cache
def _rotation_constants(H: int, base: float) -> tuple[mx.array, mx.array, mx.array]:
    frequencies = mx.power(base, mx.arange(0, H, 2) / -H)
    one, none = mx.eye(H // 2), mx.zeros((H // 2, H // 2))
    crossed = mx.concatenate(
        [mx.concatenate([none, one], axis=1), mx.concatenate([-one, none], axis=1)]
    )
    constants = mx.concatenate([frequencies, frequencies]), mx.eye(H), crossed
    mx.eval(constants)
    return constants


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up, all of one shape (B, T, F)."""
    if gate.shape[-2] == 1:  # one token: the number of operations counts
        return gate * mx.sigmoid(gate) * up
    out: mx.array = _plain_swiglu(gate, up)  # type: ignore[assignment] # untyped
    return out


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


def attend_one_query(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None
) -> mx.array:
    """Return the attended values (B, Q, 1, H) of one query in each sequence."""
    B, Q, _, H = queries.shape
    K = keys.shape[1]
    grouped = (queries * H**-0.5).reshape(B, K, Q // K, H)
    scores = grouped @ keys.swapaxes(-1, -2)  # (B, K, Q / K, S)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    return (mx.softmax(scores, axis=-1) @ values).reshape(B, Q, 1, H)


def attend_causally(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Return the attended values (B, Q, T, H); the last query attends to all keys."""
    attended: mx.array
    attended, _ = _attend_causally(queries, keys, values)  # type: ignore[misc] # untyped
    return attended


@mx.custom_function
def _attend_causally(
    queries: mx.array, keys: mx.array, values: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the attended values (B, Q, T, H), and log2 of the sums of the weights.

    The scores of `QUERIES` queries exist at a time. The gradient uses the sums.
    """
    B, Q, T, H = queries.shape
    S = keys.shape[2]
    attended, sums = [], []
    for start in range(0, T, QUERIES):
        end = min(start + QUERIES, T)
        visible = S - T + end
        scores = _score(queries[:, :, start:end], keys[:, :, :visible])
        largest = scores.max(axis=-1, keepdims=True)
        weights = mx.power(2.0, scores - largest)  # (B, K, Q / K * t, s)
        total = weights.sum(axis=-1, keepdims=True)
        part = (weights @ values[:, :, :visible]) / total
        attended.append(part.reshape(B, Q, end - start, H))
        sums.append((largest + mx.log2(total)).reshape(B, Q, end - start))
    return _join(attended, axis=2), _join(sums, axis=2)


@_attend_causally.vjp
def _attend_causally_vjp(
    primals: tuple[mx.array, mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array],
    outputs: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array, mx.array]:
    """Recompute the weights from their sums: less memory than keeping them."""
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
        visible = S - T + end
        rows = Q // K * (end - start)
        scores = _score(queries[:, :, start:end], keys[:, :, :visible])
        weights = mx.power(2.0, scores - sums[:, :, start:end].reshape(B, K, rows, 1))
        arriving = cotangent[:, :, start:end].reshape(B, K, rows, H)
        moved = arriving @ values[:, :, :visible].swapaxes(-1, -2)
        moved = weights * (moved - along[:, :, start:end].reshape(B, K, rows, 1))
        part = (moved @ keys[:, :, :visible]) * H**-0.5
        query_parts.append(part.reshape(B, Q, end - start, H))
        scaled = queries[:, :, start:end].reshape(B, K, rows, H) * H**-0.5
        for_keys = moved.swapaxes(-1, -2) @ scaled
        for_values = weights.swapaxes(-1, -2) @ arriving
        if visible == S == end - start:
            key_gradient, value_gradient = for_keys, for_values
        else:
            key_gradient = key_gradient.at[:, :, :visible].add(for_keys)
            value_gradient = value_gradient.at[:, :, :visible].add(for_values)
    return _join(query_parts, axis=2), key_gradient, value_gradient


def _score(queries: mx.array, keys: mx.array) -> mx.array:
    """Return scores in powers of two (B, K, Q / K * T, S), -inf after each query."""
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
    """Return exp(logit - largest) (M, V), its sum (M, 1), and log Z (M,)."""
    logits = (hidden * LOG2_E) @ head.T  # (M, V)
    largest = logits.max(axis=-1, keepdims=True)
    powers = mx.power(2.0, logits - largest)
    total = powers.sum(axis=-1, keepdims=True)
    log_z = (largest + mx.log2(total))[:, 0] / LOG2_E
    return powers, total, log_z


def use_decoding_threads(config: OpenELMConfig) -> None:
    """Run the products of a few tokens on one thread where the model is small."""
    openblas.use_threads(1 if _count_parameters(config) < FEW_PARAMETERS else None)


@cache
def _count_parameters(config: OpenELMConfig) -> int:
    return config.num_parameters
