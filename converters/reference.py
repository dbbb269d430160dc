"""OpenELM in PyTorch, with CoreNet's tensor names, for training and parity checks.

It follows Mehta et al., "OpenELM" (arXiv 2404.14619), and is tested against stored
outputs of Apple's implementation (tests/golden). Letters in the comments:

    B  sequences in the batch         D  model_dim
    T  tokens of this call            H  head_dim
    S  tokens attended to, S >= T     Q  query heads of this layer
    V  rows of the embedding          K  key-value heads of this layer
    L  layers                         F  FFN width of this layer
"""

import torch
import torch.nn.functional as F_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlx_openelm.config import OpenELMConfig

KVCache = list[tuple[Tensor, Tensor] | None]  # per layer: rotated keys, values


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
    """Return cos and sin, float32 (T, H), for the half-split rotation."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] / base**exponents  # (T, H/2)
    angles = torch.cat([angles, angles], dim=-1)  # (T, H): pairs are (i, i + H/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, heads, T, H) in float32."""
    cos, sin = angles
    left, right = x.float().chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return (x.float() * cos + turned * sin).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention with normalised, rotated queries and keys."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
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
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, T, _ = x.shape
        Q, K, H = self.num_query_heads, self.num_kv_heads, self.head_dim
        qkv = self.qkv_proj(x).view(B, T, Q + 2 * K, H).transpose(1, 2)
        queries, keys, values = qkv.split([Q, K, K], dim=1)  # (B, heads, T, H)
        queries = rotate(self.q_norm(queries), angles)
        keys = rotate(self.k_norm(keys), angles)
        if past is not None:
            keys = torch.cat([past[0], keys], dim=2)  # (B, K, S, H)
            values = torch.cat([past[1], values], dim=2)
        S = keys.shape[2]
        mask = None  # not needed for a single query or a square causal mask
        if 1 < T < S:
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        # Query head j reads key-value head j // (Q / K).
        attended = F_.scaled_dot_product_attention(
            queries,
            keys.repeat_interleave(Q // K, dim=1),
            values.repeat_interleave(Q // K, dim=1),
            attn_mask=mask,
            is_causal=T == S and T > 1,
        )  # (B, Q, T, H)
        out = self.out_proj(attended.transpose(1, 2).reshape(B, T, Q * H))
        return out, (keys, values)


class FeedForward(nn.Module):
    """SwiGLU: proj_2(silu(gate) * up), gate and up stacked in proj_1."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        F = config.ffn_dims[layer]
        self.proj_1 = nn.Linear(config.model_dim, 2 * F, bias=False)
        self.proj_2 = nn.Linear(F, config.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.proj_1(x).chunk(2, dim=-1)  # each (B, T, F)
        out: Tensor = self.proj_2(F_.silu(gate) * up)
        return out


class Block(nn.Module):
    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.ffn = FeedForward(config, layer)
        self.ffn_norm = RMSNorm(config.model_dim, config.rms_norm_eps)
        self.attn_norm = RMSNorm(config.model_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, present = self.attn(self.attn_norm(x), angles, past)
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), present


class ReferenceOpenELM(nn.Module):
    """The whole model, with the state dict names and order of CoreNet.

    An untied head, which CoreNet's releases do not have, is called `lm_head`.

    Attributes:
        checkpointing: activation checkpointing: keep only the input of each block and
            recompute the rest in the backward pass. The results are unchanged.
    """

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(
            Block(config, i) for i in range(config.num_transformer_layers)
        )
        self.norm = RMSNorm(config.model_dim, config.rms_norm_eps)
        if not config.share_input_output_layers:
            self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights as CoreNet does: zero-mean normals.

        The embedding has std D^-1/2 and a linear in_features^-1/2; the projections that
        write to the residual stream have D^-1/2 (2L)^-1/2. Norm weights are 1.
        """
        D, L = self.config.model_dim, self.config.num_transformer_layers
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=D**-0.5)
            elif name.endswith((".out_proj", ".proj_2")):
                module.weight.normal_(std=D**-0.5 * (2 * L) ** -0.5)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return logits (B, T, V) for tokens (B, T).

        Args:
            cache: from `empty_cache`; updated with the new keys and values.
        """
        return self.head(self.hidden(tokens, cache))

    def empty_cache(self) -> KVCache:
        return [None] * self.config.num_transformer_layers

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the normed last hidden states (B, T, D)."""
        past = cache if cache is not None else self.empty_cache()
        start = 0 if past[0] is None else past[0][0].shape[2]
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        angles = rotary_angles(
            positions, self.config.head_dim, self.config.rope_freq_constant
        )
        x = self.token_embeddings(tokens)  # (B, T, D)
        for i, block in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x, present = checkpoint(  # without dropout there is no RNG to restore
                    block,
                    x,
                    angles,
                    past[i],
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x, present = block(x, angles, past[i])
            if cache is not None:
                cache[i] = present
        out: Tensor = self.norm(x)
        return out

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
