"""OpenELM in PyTorch, with CoreNet's tensor names.

It follows Mehta et al., "OpenELM" (arXiv 2404.14619). mlx-openelm trains and checks
with it, tests it against stored outputs of Apple's implementation, and copies this file
unchanged into the folders that it writes for transformers. So it imports torch alone.
Letters in the comments:

    B  sequences in the batch         D  model_dim
    T  tokens of this call            H  head_dim
    S  tokens attended to, S >= T     Q  query heads of this layer
    V  rows of the embedding          K  key-value heads of this layer
    L  layers                         F  FFN width of this layer
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Sizes(Protocol):
    """The sizes of an OpenELM; the lists have one entry per layer."""

    @property
    def model_dim(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def num_query_heads(self) -> Sequence[int]: ...
    @property
    def num_kv_heads(self) -> Sequence[int]: ...
    @property
    def ffn_dims(self) -> Sequence[int]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_context_length(self) -> int: ...
    @property
    def rope_freq_constant(self) -> float: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def share_input_output_layers(self) -> bool: ...


class Cache(Protocol):
    """Rotated keys and values of earlier tokens, as transformers' caches hold them."""

    def get_seq_length(self) -> int:
        """Return the number of earlier tokens."""
        ...

    def update(
        self, keys: Tensor, values: Tensor, layer: int, /
    ) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens; return all of this layer."""
        ...


class GrowingCache:
    """A cache without a limit, as long as the tokens that it holds."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        return self._layers[0][0].shape[2] if self._layers else 0

    def update(
        self, keys: Tensor, values: Tensor, layer: int, /
    ) -> tuple[Tensor, Tensor]:
        if layer in self._layers:
            past_keys, past_values = self._layers[layer]
            keys = torch.cat([past_keys, keys], dim=2)  # (B, K, S, H)
            values = torch.cat([past_values, values], dim=2)
        self._layers[layer] = keys, values
        return keys, values


class RMSNorm(nn.Module):
    """x / rms(x) in float32, rounded to x's dtype, then times the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        rms_inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * rms_inverse).type_as(x) * self.weight


def rotary_angles(
    positions: Tensor, head_dim: int, base: float
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, float32 (1 or B, 1, T, H), for the half-split rotation.

    Args:
        positions: (1, T), or (B, T) if the sequences differ.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None, :, None] / base**exponents  # (B, 1, T, H/2)
    angles = torch.cat([angles, angles], dim=-1)  # pairs are (i, i + H/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, heads, T, H) in float32."""
    cos, sin = angles
    left, right = x.float().chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return (x.float() * cos + turned * sin).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention with normalised, rotated queries and keys."""

    def __init__(self, config: Sizes, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.num_query_heads = config.num_query_heads[layer]
        self.num_kv_heads = config.num_kv_heads[layer]
        rows = (self.num_query_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.model_dim, rows, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(
            self.num_query_heads * self.head_dim, config.model_dim, bias=False
        )

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        B, T, _ = x.shape
        Q, K, H = self.num_query_heads, self.num_kv_heads, self.head_dim
        qkv = self.qkv_proj(x).view(B, T, Q + 2 * K, H).transpose(1, 2)
        queries, keys, values = qkv.split([Q, K, K], dim=1)  # (B, heads, T, H)
        queries = rotate(self.q_norm(queries), angles)
        keys = rotate(self.k_norm(keys), angles)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer)  # (B, K, S, H)
        # Query head j reads key-value head j // (Q / K).
        attended = F_.scaled_dot_product_attention(
            queries,
            keys.repeat_interleave(Q // K, dim=1),
            values.repeat_interleave(Q // K, dim=1),
            attn_mask=mask,
            is_causal=mask is None and T > 1,
        )  # (B, Q, T, H)
        out: Tensor = self.out_proj(attended.transpose(1, 2).reshape(B, T, Q * H))
        return out


class FeedForward(nn.Module):
    """SwiGLU: proj_2(silu(gate) * up), gate and up stacked in proj_1."""

    def __init__(self, config: Sizes, layer: int) -> None:
        super().__init__()
        F = config.ffn_dims[layer]
        self.proj_1 = nn.Linear(config.model_dim, 2 * F, bias=False)
        self.proj_2 = nn.Linear(F, config.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.proj_1(x).chunk(2, dim=-1)  # each (B, T, F)
        out: Tensor = self.proj_2(F_.silu(gate) * up)
        return out


class Block(nn.Module):
    def __init__(self, config: Sizes, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.ffn = FeedForward(config, layer)
        self.ffn_norm = RMSNorm(config.model_dim, config.rms_norm_eps)
        self.attn_norm = RMSNorm(config.model_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        x = x + self.attn(self.attn_norm(x), angles, mask, cache)
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class Decoder(nn.Module):
    """Embedding, blocks and final norm, with CoreNet's names: all but the head.

    Attributes:
        checkpointing: activation checkpointing: keep only the input of each block and
            recompute the rest in the backward pass. The results are unchanged.
        has_dropout: blocks contain dropout, as adapters of PEFT do; recomputing draws
            the same random numbers again.
    """

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.checkpointing = self.has_dropout = False
        self.head_dim, self.rope_base = config.head_dim, config.rope_freq_constant
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(len(config.ffn_dims))
        )
        self.norm = RMSNorm(config.model_dim, config.rms_norm_eps)

    def decode(
        self,
        x: Tensor,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        inputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the normed last hidden states (B, T, D) of embeddings (B, T, D).

        Args:
            cache: extended by the keys and values of these tokens.
            positions: (1, T) or (B, T); by default they follow those of the cache.
            mask: (B, 1, T, S) or one that broadcasts, boolean or to add; by default
                causal, of a cache that is as long as its tokens.
            inputs: extended by the input of each block.
        """
        T, start = x.shape[1], 0 if cache is None else cache.get_seq_length()
        if positions is None:
            positions = torch.arange(start, start + T, device=x.device)[None]
        if mask is None and start > 0 and T > 1:  # not needed for one or the first
            S = start + T
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(start)
        angles = rotary_angles(positions, self.head_dim, self.rope_base)
        for block in self.layers:
            if inputs is not None:
                inputs.append(x)
            if self.checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(
                    block,
                    x,
                    angles,
                    mask,
                    None,
                    use_reentrant=False,
                    preserve_rng_state=self.has_dropout,
                )
            else:
                x = block(x, angles, mask, cache)
        out: Tensor = self.norm(x)
        return out


class ReferenceOpenELM(Decoder):
    """The whole model, with the state dict names and order of CoreNet.

    An untied head, which CoreNet's releases do not have, is called `lm_head`.
    """

    def __init__(self, config: Sizes) -> None:
        super().__init__(config)
        self.config = config
        if not config.share_input_output_layers:
            self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights as CoreNet does: zero-mean normals.

        The embedding has std D^-1/2 and a linear in_features^-1/2; the projections that
        write to the residual stream have D^-1/2 (2L)^-1/2. Norm weights are 1.
        """
        D, L = self.config.model_dim, len(self.layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=D**-0.5)
            elif name.endswith((".out_proj", ".proj_2")):
                module.weight.normal_(std=D**-0.5 * (2 * L) ** -0.5)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return logits (B, T, V) for tokens (B, T)."""
        return self.head(self.hidden(tokens, cache))

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the normed last hidden states (B, T, D)."""
        return self.decode(self.token_embeddings(tokens), cache)

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits (B, T, V); a tied head is the transposed embedding."""
        if self.config.share_input_output_layers:
            return F_.linear(hidden, self.token_embeddings.weight)
        logits: Tensor = self.lm_head(hidden)
        return logits


def summed_loss(
    logits: Tensor, targets: Tensor, *, z_loss: float = 0.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of the targets, without and with z-loss.

    z-loss adds `z_loss` x logsumexp(logits)^2 for each target (OpenELM: 1e-4). (CoreNet
    also adds a constant for pad positions, which has no gradient.) In nats, float32.

    Args:
        logits: (B, T, V)
        targets: (B, T); positions with `ignore_index` do not count.
    """
    logits32 = logits.float().flatten(0, 1)  # (B*T, V)
    flat = targets.flatten()
    counted = flat != ignore_index
    log_partition = torch.logsumexp(logits32, dim=-1)  # (B*T,)
    picked = logits32.gather(-1, flat.clamp(min=0)[:, None]).squeeze(-1)
    cross_entropy = ((log_partition - picked) * counted).sum()
    penalty = (log_partition.square() * counted).sum()
    return cross_entropy, cross_entropy + z_loss * penalty
