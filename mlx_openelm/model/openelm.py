"""OpenELM in MLX, top to bottom.

What makes it OpenELM (Mehta et al., arXiv 2404.14619): layers differ in width, the
first ones narrow and the last ones wide; queries share keys and values in groups;
queries and keys are RMS-normalised per head before RoPE; the FFN is a SwiGLU; the
embedding is read backwards as output head; nothing has a bias. Letters:

    B  sequences in the batch         D  model_dim
    T  tokens given to this call      H  head_dim
    S  tokens attended to, S >= T     Q  query heads of this layer
    V  rows of the embedding          K  key-value heads of this layer
    N  tokens of all sequences        F  FFN width of this layer

Module names and the calling contract are mlx-lm's, whose caches are taken as well.
"""

import itertools
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.model.kernels import (
    Rotation,
    attend,
    normalize,
    rotation_after,
    rotation_at,
    swiglu,
)


class LayerCache(Protocol):
    """What the model asks of a cache; mlx-lm's caches and ours have it."""

    @property
    def offset(self) -> int | mx.array: ...  # tokens held: of all, or of each, (B,)

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]: ...


class Row(ABC):
    """Several sequences of any lengths in one row of N tokens, without padding."""

    @abstractmethod
    def rotation(self, H: int, base: float, dtype: mx.Dtype) -> Rotation:
        """Return the rotation of each token to its place in its own sequence."""

    @abstractmethod
    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Return (1, Q, N, H), each token seeing what stands before it in its own."""


@dataclass(frozen=True, slots=True)
class Sequences(Row):
    """Sequences that stand end to end; none sees another."""

    lengths: tuple[int, ...]

    def rotation(self, H: int, base: float, dtype: mx.Dtype) -> Rotation:
        positions = [mx.arange(length) for length in self.lengths]
        return rotation_at(mx.concatenate(positions), H, base)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        ends = list(itertools.accumulate(self.lengths))[:-1]
        split = (mx.split(x, ends, axis=2) for x in (queries, keys, values))
        parts = [attend(q, k, v, "causal") for q, k, v in zip(*split, strict=True)]
        return mx.concatenate(parts, axis=2)


Mask = mx.array | str | Row | None


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis (1910.07467)."""

    def __call__(self, x: mx.array) -> mx.array:
        return normalize(x, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class _HeadScales:
    """The norms' weights, joined once: a step has few operations to spare."""

    norms: tuple[mx.array, mx.array]
    joined: mx.array

    def are_of(self, norms: tuple[mx.array, mx.array]) -> bool:
        return all(map(operator.is_, self.norms, norms))


class Attention(nn.Module):
    """Grouped-query attention with normalised, rotated queries and keys.

    Queries and keys ask alike: they are normalised and rotated together.
    """

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        D, H = config.model_dim, config.head_dim
        Q, K = config.num_query_heads[layer], config.num_kv_heads[layer]
        self.num_query_heads, self.num_kv_heads, self.head_dim = Q, K, H
        self.qkv_proj = nn.Linear(D, (Q + 2 * K) * H, bias=False)
        self.q_norm = RMSNorm(H, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(H, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(Q * H, D, bias=False)
        self._scales: _HeadScales | None = None

    def __call__(
        self, x: mx.array, rotate: Rotation, mask: Mask, cache: LayerCache | None
    ) -> mx.array:
        B, T, _ = x.shape
        Q, K, H = self.num_query_heads, self.num_kv_heads, self.head_dim
        qkv = self.qkv_proj(x).reshape(B, T, Q + 2 * K, H)
        asking, values = mx.split(qkv, [Q + K], axis=2)  # (B, T, heads, H)
        longer = cache is None or T > 1
        asking = normalize(asking, self.head_scales(fresh=longer), self.q_norm.eps)
        queries, keys = mx.split(rotate(asking), [Q], axis=1)  # (B, heads, T, H)
        values = values.swapaxes(1, 2)  # (B, K, T, H)
        if isinstance(mask, Row):
            attended = mask.attend(queries, keys, values)  # (1, Q, N, H)
        else:
            if cache is not None:
                keys, values = cache.update_and_fetch(keys, values)  # (B, K, S, H)
            attended = attend(queries, keys, values, mask)  # (B, Q, T, H)
        return self.out_proj(attended.swapaxes(1, 2).reshape(B, T, Q * H))

    def head_scales(self, *, fresh: bool) -> mx.array:
        """Return the weights of q_norm and k_norm, a row for each head, (Q + K, H).

        Args:
            fresh: join them anew, for they may have been changed in place.
        """
        norms = self.q_norm.weight, self.k_norm.weight
        if fresh or self._scales is None or not self._scales.are_of(norms):
            counts = self.num_query_heads, self.num_kv_heads
            rows = zip(norms, counts, strict=True)
            joined = mx.concatenate([mx.tile(w, (count, 1)) for w, count in rows])
            if self.training:
                return joined
            self._scales = _HeadScales(norms, joined)
        return self._scales.joined


class FeedForward(nn.Module):
    """SwiGLU: proj_2(silu(gate) * up), gate and up stacked in proj_1."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        F = config.ffn_dims[layer]
        self.proj_1 = nn.Linear(config.model_dim, 2 * F, bias=False)
        self.proj_2 = nn.Linear(F, config.model_dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.proj_1(x), 2, axis=-1)  # each (B, T, F)
        return self.proj_2(swiglu(gate, up))


class Block(nn.Module):
    """Attention and FFN, each on a normalised copy and added to the stream."""

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
        mask: Mask = None,
        cache: LayerCache | None = None,
    ) -> mx.array:
        x = x + self.attn(self.attn_norm(x), rotate, mask, cache)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """Embedding, blocks, final norm.

    Attributes:
        checkpointed: in training, keep only what goes into each block and compute the
            block again for its gradient: less memory for a third more work.
    """

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = [Block(config, i) for i in range(config.num_transformer_layers)]
        self.norm = RMSNorm(config.model_dim, eps=config.rms_norm_eps)
        self.config = config
        self.checkpointed = False

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[LayerCache] | None = None,
        *,
        row: Row | None = None,
    ) -> mx.array:
        """Return normed hidden states (B, T, D) for token ids (B, T).

        Args:
            row: the tokens, (1, N), are those of several sequences.
        """
        x = self.token_embeddings(tokens)  # (B, T, D)
        H, base = self.config.head_dim, self.config.rope_freq_constant
        if row is not None:
            mask: Mask = row
            rotate = row.rotation(H, base, x.dtype)
        else:
            mask = _causal_mask(tokens.shape[1], cache)
            offset = cache[0].offset if cache else 0
            rotate = rotation_after(offset, tokens.shape[1], H, base, x.dtype)
        caches = cache if cache is not None else [None] * len(self.layers)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            step = nn.utils.checkpoint(layer) if self.checkpointed else layer
            x = step(x, rotate, mask, layer_cache)
        normed: mx.array = self.norm(x)
        return normed


class OpenELM(nn.Module):
    """The language model: tokens in, logits out.

    Attributes:
        config: its sizes.
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
            cache: one for each layer; the new keys and values are added to it.
        """
        return self.head(self.transformer(inputs, cache))

    def head(self, hidden: mx.array) -> mx.array:
        """Return logits (..., V) for normed hidden states (..., D)."""
        if self.config.share_input_output_layers:
            tied: mx.array = self.transformer.token_embeddings.as_linear(hidden)
            return tied
        logits: mx.array = self.lm_head(hidden)
        return logits

    @property
    def head_module(self) -> nn.Module:
        """What is read backwards as output head: the embedding, if it is tied."""
        tied = self.config.share_input_output_layers
        module: nn.Module = self.transformer.token_embeddings if tied else self.lm_head
        return module

    @property
    def layers(self) -> list[Block]:
        return self.transformer.layers


def from_start(
    config: OpenELMConfig, num_tokens: int, dtype: mx.Dtype = mx.float32
) -> tuple[Rotation, Mask]:
    """Return what a block needs for tokens that nothing stands before."""
    H, base = config.head_dim, config.rope_freq_constant
    return rotation_after(0, num_tokens, H, base, dtype), _causal_mask(num_tokens, None)


def _causal_mask(num_tokens: int, cache: Sequence[LayerCache] | None) -> Mask:
    """A query sees what stands before it; one token at the end sees everything."""
    if cache and hasattr(cache[0], "make_mask"):  # mlx-lm's caches may slide
        mask: Mask = cache[0].make_mask(
            num_tokens, return_array=False, window_size=None
        )
        return mask
    return "causal" if num_tokens > 1 else None
