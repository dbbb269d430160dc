"""RMSNorm, RoPE, SwiGLU, attention and projections as MLX's fused operations.

On the Linux CPU, where MLX has no fused kernels, each function delegates to
`cpu_kernels`, which is imported only there. Letters:

    B  sequences          Q  query heads             T  queries per sequence
    H  head_dim           K  key-value heads         S  keys per sequence
    D  model_dim          F  FFN width               V  rows of the output head
    M  positions to score
"""

import sys
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.device import runs_on_linux_cpu, takes_gpu_path
from mlx_openelm.model.joined_heads import JoinedRotation

if sys.platform == "linux":
    from mlx_openelm.model import cpu_kernels as cpu


def normalize(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return x / sqrt(mean(x^2) + eps) * weight, over the last axis (1910.07467).

    Args:
        x: (..., D), or (..., heads, H) with a weight (heads, H).
    """
    if runs_on_linux_cpu() and x.dtype == mx.float32 and x.size <= cpu.FEW_NUMBERS:
        return cpu.normalize(x, weight, eps)
    if weight.ndim == 1:
        return mx.fast.rms_norm(x, weight, eps)
    return mx.fast.rms_norm(x, None, eps) * weight


# RoPE (Su et al., 2104.09864) at fixed positions: (B, T, heads, H) -> (B, heads, T, H),
# or together with the norms.
Rotation = Callable[[mx.array], mx.array] | JoinedRotation


def rotation_after(
    offset: int | mx.array, num_tokens: int, H: int, base: float, dtype: mx.Dtype
) -> Rotation:
    """Return the rotation of `num_tokens` tokens that start at position `offset`.

    Args:
        offset: one for all sequences, or one per sequence, (B,).
    """
    on_cpu = runs_on_linux_cpu() and dtype == mx.float32
    if not (takes_gpu_path() or on_cpu):
        return partial(_rotate_fused, H=H, base=base, offset=offset)
    if isinstance(offset, mx.array) and offset.ndim == 1:
        offset = offset[:, None]
    return rotation_at(offset + mx.arange(num_tokens), H, base)


def rotation_at(positions: mx.array, H: int, base: float) -> Rotation:
    """Return the rotation of tokens at the given positions, (T,) or (B, T)."""
    if takes_gpu_path():
        return JoinedRotation.at(positions, H, base)
    if runs_on_linux_cpu() and positions.size <= cpu.FEW_TOKENS:
        return partial(
            cpu.rotate_by_matrix, matrix=cpu.rotation_matrix(positions, H, base)
        )
    frequencies = mx.power(base, mx.arange(0, H, 2) / -H)  # (H / 2,)
    angles = positions[..., None, None] * frequencies  # (..., T, 1, H / 2)
    return partial(_rotate_pairs, cos=mx.cos(angles), sin=mx.sin(angles))


def _rotate_fused(x: mx.array, H: int, base: float, offset: int | mx.array) -> mx.array:
    return mx.fast.rope(
        x.swapaxes(1, 2), H, traditional=False, base=base, scale=1.0, offset=offset
    )


def _rotate_pairs(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    a, b = mx.split(x, 2, axis=-1)  # each (B, T, heads, H / 2)
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    rotated = mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.swapaxes(1, 2)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up, all of shape (B, T, F)."""
    if runs_on_linux_cpu():
        return cpu.swiglu(gate, up)
    return _compiled_swiglu(gate, up) if takes_gpu_path() else _swiglu(gate, up)


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


_compiled_swiglu = mx.compile(_swiglu, shapeless=True)


def add_projection(onto: mx.array, linear: nn.Module, x: mx.array) -> mx.array:
    """Return onto + linear(x); on a GPU in one operation, if it is a plain linear."""
    if takes_gpu_path() and type(linear) is nn.Linear and "bias" not in linear:
        return mx.addmm(onto, x, linear.weight.T)
    added: mx.array = onto + linear(x)
    return added


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None
) -> mx.array:
    """Return softmax(queries keys^T / sqrt(H)) values, (B, Q, T, H).

    Args:
        queries: (B, Q, T, H).
        keys: (B, K, S, H), as the values; Q / K query heads share each of them.
        mask: "causal" (the last query attends to all keys), None, or a bool array that
            is true where a query attends to a key.
    """
    on_cpu = runs_on_linux_cpu() and queries.dtype == mx.float32
    if on_cpu and isinstance(mask, str):
        return cpu.attend_causally(queries, keys, values)
    if on_cpu and queries.shape[2] == 1 and not isinstance(mask, str):
        return cpu.attend_one_query(queries, keys, values, mask)
    return mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=queries.shape[-1] ** -0.5, mask=mask
    )


def softmax_parts(
    hidden: mx.array, head: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return exp(logit - largest logit) (M, V), its sum (M, 1), and log Z (M,).

    Z is the sum of exp(logit) over the vocabulary.

    Args:
        hidden: float32 (M, D); head: float32 (V, D).
    """
    if runs_on_linux_cpu():
        return cpu.softmax_parts(hidden, head)
    logits = hidden @ head.T
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = mx.exp(logits - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials, total, (largest + mx.log(total))[:, 0]


def use_decoding_threads(config: OpenELMConfig) -> None:
    """Limit the CPU's threads to the number that is fastest in decoding."""
    if runs_on_linux_cpu():
        cpu.use_decoding_threads(config)
