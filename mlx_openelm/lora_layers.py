"""LoRA and DoRA layers, with mlx-lm's tensors and names.

LoRA: Hu et al., arXiv 2106.09685; DoRA: Liu et al., arXiv 2402.09353. `scale` is the
multiplier itself, not alpha / rank. Letters: I inputs, O outputs, R rank, V rows.
"""

import mlx.core as mx
import mlx.nn as nn


class LoRALinear(nn.Module):
    """y = linear(x) + scale * x A B, with A (I, R) and B (R, O)."""

    def __init__(
        self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float
    ) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b, self.scale = lora_a, lora_b, scale

    def __call__(self, x: mx.array) -> mx.array:
        update = (x @ self.lora_a) @ self.lora_b  # (..., O)
        out: mx.array = self.linear(x) + (self.scale * update).astype(x.dtype)
        return out


class DoRALinear(LoRALinear):
    """The same, each output rescaled so that its row of the sum has length m (O,)."""

    def __init__(
        self,
        linear: nn.Module,
        lora_a: mx.array,
        lora_b: mx.array,
        scale: float,
        m: mx.array,
    ) -> None:
        super().__init__(linear, lora_a, lora_b, scale)
        self.m = m

    def __call__(self, x: mx.array) -> mx.array:
        weight = _unpacked_weight(self.linear)  # (O, I)
        adapted = weight + (self.scale * self.lora_b.T) @ self.lora_a.T
        lengths = mx.linalg.norm(adapted, axis=1)
        return super().__call__(x) * (self.m / lengths).astype(x.dtype)


class LoRAEmbedding(nn.Module):
    """Rows E + scale * A B, with A (V, R) and B (R, D); also when read backwards."""

    def __init__(
        self, embedding: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.lora_a, self.lora_b, self.scale = lora_a, lora_b, scale

    def __call__(self, tokens: mx.array) -> mx.array:
        rows: mx.array = self.embedding(tokens)
        update = self.scale * (self.lora_a[tokens] @ self.lora_b)
        return rows + update.astype(rows.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        logits: mx.array = self.embedding.as_linear(x)
        update = self.scale * ((x @ self.lora_b.T) @ self.lora_a.T)
        return logits + update.astype(logits.dtype)


def _unpacked_weight(linear: nn.Module) -> mx.array:
    if isinstance(linear, nn.QuantizedLinear):
        return mx.dequantize(
            linear.weight,
            linear.scales,
            linear.biases,
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
    weight: mx.array = linear.weight
    return weight
