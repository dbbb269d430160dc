"""OpenELM in MLX (Mehta et al., arXiv 2404.14619).

A decoder-only transformer. Compared with Llama: layers differ in width, from narrow at
the bottom to wide at the top; queries and keys are RMS-normalised per head before RoPE;
the output head is the tied (transposed) embedding. As in Llama: pre-norm with RMSNorm,
grouped-query attention, SwiGLU, no biases. Letters:

    B  sequences in the batch         D  model_dim
    T  new tokens per sequence        H  head_dim
    S  tokens attended to, S >= T     Q  query heads of the layer
    V  rows of the embedding          K  key-value heads of the layer
                                      F  FFN width of the layer

See also `kernels` (the operations), `head_norm`, and `token_layout` (which tokens form
a sequence). Module names and the calling contract are those of mlx-lm.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.model.head_norm import HeadNorm
from mlx_openelm.model.joined_heads import Heads, JoinedRotation
from mlx_openelm.model.kernels import (
    Rotation,
    add_projection,
    normalize,
    swiglu,
)
from mlx_openelm.model.token_layout import Continuation, LayerCache, TokenLayout

Noise = Callable[[mx.array, TokenLayout], mx.array]  # embeddings -> embeddings


class OpenELM(nn.Module):
    """The language model: tokens in, logits out.

    Attributes:
        config: the sizes of the model.
    """

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        if not config.share_input_output_layers:
            self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)

    def __call__(
        self, inputs: mx.array, cache: Sequence[LayerCache] | None = None
    ) -> mx.array:
        """Return logits (B, T, V) for token ids (B, T).

        Args:
            cache: one KV cache per layer; receives the new keys and values.
        """
        return self.head(self.transformer(inputs, cache))

    def head(self, hidden: mx.array) -> mx.array:
        """Return logits (..., V) for normalised hidden states (..., D)."""
        if self.config.share_input_output_layers:
            tied: mx.array = self.transformer.token_embeddings.as_linear(hidden)
            return tied
        logits: mx.array = self.lm_head(hidden)
        return logits

    @property
    def head_module(self) -> nn.Module:
        """The module whose weight is the output head: the embedding if tied."""
        tied = self.config.share_input_output_layers
        module: nn.Module = self.transformer.token_embeddings if tied else self.lm_head
        return module

    @property
    def layers(self) -> "list[Block]":
        return self.transformer.layers


class Transformer(nn.Module):
    """Embedding, blocks, final norm.

    Attributes:
        checkpointed: gradient checkpointing: training keeps only the input of each
            block and recomputes the rest, for less memory and a third more work.
        noise: adds noise to the embeddings in training; None: no noise.
    """

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = [Block(config, i) for i in range(config.num_transformer_layers)]
        self.norm = RMSNorm(config.model_dim, eps=config.rms_norm_eps)
        self.config = config
        self.checkpointed = False
        self.noise: Noise | None = None

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[LayerCache] | None = None,
        *,
        layout: TokenLayout | None = None,
    ) -> mx.array:
        """Return normalised hidden states (B, T, D) for token ids (B, T).

        Args:
            cache: one KV cache per layer; receives the new keys and values.
            layout: how the tokens form sequences; by default each row continues one
                sequence of the cache.
        """
        layout = layout or Continuation.after(cache, tokens.shape[1])
        x = self.token_embeddings(tokens)  # (B, T, D)
        if self.noise is not None:
            x = self.noise(x, layout)
        rotate = layout.rotation(
            self.config.head_dim, self.config.rope_freq_constant, x.dtype
        )
        caches = cache if cache is not None else [None] * len(self.layers)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            block = nn.utils.checkpoint(layer) if self.checkpointed else layer
            x = block(x, rotate, layout, layer_cache)
        normed: mx.array = self.norm(x)
        return normed


class Block(nn.Module):
    """x + attention(norm(x)), then x + FFN(norm(x)), with x (B, T, D)."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.ffn = FeedForward(config, layer)
        self.attn_norm = RMSNorm(config.model_dim, eps=config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.model_dim, eps=config.rms_norm_eps)

    def __call__(
        self,
        x: mx.array,
        rotate: Rotation,
        layout: TokenLayout,
        cache: LayerCache | None = None,
    ) -> mx.array:
        x = self.attn(self.attn_norm(x), rotate, layout, cache, onto=x)
        return self.ffn(self.ffn_norm(x), onto=x)


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normalised per head and rotated."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        D, H = config.model_dim, config.head_dim
        Q, K = config.num_query_heads[layer], config.num_kv_heads[layer]
        self.num_query_heads, self.num_kv_heads, self.head_dim = Q, K, H
        self.qkv_proj = nn.Linear(D, (Q + 2 * K) * H, bias=False)
        self.q_norm = RMSNorm(H, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(H, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(Q * H, D, bias=False)
        self._head_norm = HeadNorm()

    def __call__(
        self,
        x: mx.array,
        rotate: Rotation,
        layout: TokenLayout,
        cache: LayerCache | None,
        *,
        onto: mx.array,
    ) -> mx.array:
        """Return `onto` plus the attention output, (B, T, D), for x (B, T, D)."""
        B, T, _ = x.shape
        Q, K, H = self.num_query_heads, self.num_kv_heads, self.head_dim
        qkv = self.qkv_proj(x).reshape(B, T, Q + 2 * K, H)
        if isinstance(rotate, JoinedRotation):
            heads = rotate(qkv, self.q_norm, self.k_norm, Q)
        else:
            qk, values = mx.split(qkv, [Q + K], axis=2)  # (B, T, Q + K or K, H)
            cached = cache is not None
            qk = self._head_norm(qk, self.q_norm, self.k_norm, Q, cached=cached)
            queries, keys = mx.split(rotate(qk), [Q], axis=1)  # (B, Q or K, T, H)
            heads = Heads(queries, keys, values.swapaxes(1, 2))
        attended = layout.attend(heads, cache)  # (B, Q, T, H)
        joined = attended.swapaxes(1, 2).reshape(B, T, Q * H)
        return add_projection(onto, self.out_proj, joined)


class FeedForward(nn.Module):
    """SwiGLU: proj_2(silu(gate) * up); proj_1 computes gate and up together."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        F = config.ffn_dims[layer]
        self.proj_1 = nn.Linear(config.model_dim, 2 * F, bias=False)
        self.proj_2 = nn.Linear(F, config.model_dim, bias=False)

    def __call__(self, x: mx.array, *, onto: mx.array) -> mx.array:
        """Return `onto` plus the output, (B, T, D), for x (B, T, D)."""
        gate, up = mx.split(self.proj_1(x), 2, axis=-1)  # each (B, T, F)
        return add_projection(onto, self.proj_2, swiglu(gate, up))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis (1910.07467)."""

    def __call__(self, x: mx.array) -> mx.array:
        return normalize(x, self.weight, self.eps)


def from_start(
    config: OpenELMConfig, num_tokens: int, dtype: mx.Dtype = mx.float32
) -> tuple[Rotation, TokenLayout]:
    """Return the arguments of a block for the first `num_tokens` tokens."""
    layout = Continuation.after(None, num_tokens)
    rotate = layout.rotation(config.head_dim, config.rope_freq_constant, dtype)
    return rotate, layout
