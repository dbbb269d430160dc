"""SwiGLU and attention, each in the form that the back end is quickest with.

On a GPU these are MLX's fused kernels. On the CPU mx.compile would call the C++
compiler before the first token, and exp costs 19 ns an element where a power of two
costs 6 (measured on Linux); so what is large is computed with powers of two there.
"""

import math
from functools import partial

import mlx.core as mx

LOG2_E = math.log2(math.e)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up, all of one shape (B, T, F)."""
    if _on_gpu():
        return _fused_swiglu(gate, up)
    if gate.shape[-2] == 1:  # one token: fewer operations count for more
        return gate * mx.sigmoid(gate) * up
    return gate * up / (1 + mx.power(2.0, gate * -LOG2_E))


@partial(mx.compile, shapeless=True)
def _fused_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


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
    B, Q, T, _ = queries.shape
    K, S = keys.shape[1:3]
    grouped = (queries * (LOG2_E * H**-0.5)).reshape(B, K, Q // K, T, H)
    scores = grouped @ keys[:, :, None].swapaxes(-1, -2)  # (B, K, Q / K, T, S)
    visible = mx.arange(S) <= mx.arange(S - T, S)[:, None]  # (T, S)
    scores = mx.where(visible, scores, -mx.inf)
    weights = mx.power(2.0, scores - scores.max(axis=-1, keepdims=True))
    attended = (weights @ values[:, :, None]) / weights.sum(axis=-1, keepdims=True)
    return attended.reshape(B, Q, T, H)


def _on_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu
