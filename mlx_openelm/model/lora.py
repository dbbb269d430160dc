"""LoRA and DoRA layers, with mlx-lm's tensors and names.

LoRA: Hu et al., arXiv 2106.09685; DoRA: Liu et al., arXiv 2402.09353. `scale` is the
multiplier itself, not alpha / rank. Letters: I inputs, O outputs, R rank, V rows.
"""

import mlx.core as mx
import mlx.nn as nn


class LoRALinear(nn.Module):
    """y = linear(x) + scale * dropout(x) A B, with A (I, R) and B (R, O).

    Attributes:
        dropout: the share of x that the adapter does not see in training.
        key: of the random numbers of this step's dropout; without one there is none.
            It is given, not drawn, so that computing a block again drops the same.
    """

    def __init__(
        self,
        linear: nn.Module,
        lora_a: mx.array,
        lora_b: mx.array,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b, self.scale = lora_a, lora_b, scale
        self.dropout = dropout
        self._key: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self._add_update(self.linear(x), self._drop(x)).astype(x.dtype)
        return out

    def use_key(self, key: mx.array | None) -> None:
        """Set, or take away, the key of the random numbers of dropout."""
        self._key = key

    def _add_update(self, to: mx.array, x: mx.array) -> mx.array:
        return mx.addmm(to, x @ self.lora_a, self.lora_b, alpha=self.scale)  # (..., O)

    def _drop(self, x: mx.array) -> mx.array:
        if self._key is None or self.dropout == 0:
            return x
        kept = mx.random.bernoulli(1 - self.dropout, x.shape, self._key)
        return kept * x * (1 / (1 - self.dropout))


class DoRALinear(LoRALinear):
    """The same, each output rescaled so that its row of the sum has length m (O,).

    The length of the row is taken as a constant in the gradient (section 4.3 of the
    paper). With dropout, what the rescaling adds to linear(x) sees dropout(x), too, as
    in Apple's training.
    """

    def __init__(
        self,
        linear: nn.Module,
        lora_a: mx.array,
        lora_b: mx.array,
        scale: float,
        m: mx.array,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(linear, lora_a, lora_b, scale, dropout)
        self.m = m
        self._squares = mx.square(row_lengths(linear))  # (O,), of the base
        self._fixed: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        factor = (self._factor() if self._fixed is None else self._fixed).astype(
            x.dtype
        )
        seen = self._drop(x)
        adapted = self._add_update(self.linear(seen), seen).astype(x.dtype) * factor
        return adapted if seen is x else self.linear(x) - self.linear(seen) + adapted

    def fix_lengths(self) -> None:
        """Compute the rows' lengths once, for weights that no longer change."""
        self._fixed = self._factor()

    def _factor(self) -> mx.array:
        """Return m / |W + scale (A B)^T| by row, (O,).

        |w + b|^2 = |w|^2 + 2 w.b + |b|^2, so that the sum (O, I) is never made.
        """
        of_linear = self.linear(self.lora_a.T.astype(_dtype(self.linear)))  # (R, O)
        crossed = (of_linear.astype(mx.float32) * self.lora_b).sum(axis=0)
        grown = (self.lora_a.T @ self.lora_a) @ self.lora_b  # (R, O)
        squares = (
            self._squares
            + (2 * self.scale) * crossed
            + self.scale**2 * (grown * self.lora_b).sum(axis=0)
        )
        return self.m / mx.stop_gradient(mx.sqrt(squares))


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


def adapted_weight(module: nn.Module) -> mx.array:
    """Return the weight that a linear (O, I) or an embedding (V, D) stands for."""
    if isinstance(module, LoRAEmbedding):
        update = module.scale * (module.lora_a @ module.lora_b)
        return adapted_weight(module.embedding) + update
    if isinstance(module, LoRALinear):
        update = module.scale * (module.lora_a @ module.lora_b).T
        adapted = adapted_weight(module.linear) + update
        if isinstance(module, DoRALinear):
            lengths = mx.linalg.norm(adapted.astype(mx.float32), axis=1)
            adapted = adapted * (module.m / mx.stop_gradient(lengths))[:, None]
        return adapted
    if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return mx.dequantize(
            module.weight,
            module.scales,
            module.biases,
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        )
    weight: mx.array = module.weight
    return weight


def row_lengths(linear: nn.Module) -> mx.array:
    """Return the length of each row of a linear's weight, float32 (O,)."""
    return mx.linalg.norm(adapted_weight(linear).astype(mx.float32), axis=1)


def _dtype(linear: nn.Module) -> mx.Dtype:
    quantized = isinstance(linear, nn.QuantizedLinear)
    dtype: mx.Dtype = (linear.scales if quantized else linear.weight).dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16
