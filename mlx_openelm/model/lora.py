"""LoRA and DoRA layers, with mlx-lm's tensors and names.

LoRA: Hu et al., arXiv 2106.09685; DoRA: Liu et al., arXiv 2402.09353. `scale` is the
multiplier itself (PEFT's alpha / rank). Letters:

    I  inputs of the linear      R  rank             V  rows of the embedding
    O  outputs of the linear     D  model_dim
"""

import mlx.core as mx
import mlx.nn as nn

# Names of A and B in files: of a linear or an embedding with its tied head, as in
# mlx-lm, and of an embedding without its head.
A_NAMES = ("lora_a", "lora_embedding_a")
B_NAMES = ("lora_b", "lora_embedding_b")


class LoRALinear(nn.Module):
    """y = linear(x) + scale * dropout(x) A B, with A (I, R) and B (R, O).

    Attributes:
        dropout: the rate of dropout on the adapter's input in training.
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
        dropped = self._apply_dropout(x)
        out: mx.array = self._add_update(self.linear(x), dropped).astype(x.dtype)
        return out

    @property
    def key(self) -> mx.array | None:
        """The random key of dropout; None: dropout is off."""
        return self._key

    def use_key(self, key: mx.array | None) -> None:
        """Set the random key of dropout; None disables it.

        The key is passed in so that gradient checkpointing recomputes the same dropout.
        """
        self._key = key

    def _add_update(self, out: mx.array, x: mx.array) -> mx.array:
        return mx.addmm(out, x @ self.lora_a, self.lora_b, alpha=self.scale)  # (..., O)

    def _apply_dropout(self, x: mx.array) -> mx.array:
        if self._key is None or self.dropout == 0:
            return x
        kept = mx.random.bernoulli(1 - self.dropout, x.shape, self._key)
        return kept * x * (1 / (1 - self.dropout))


class DoRALinear(LoRALinear):
    """LoRA whose adapted weight is rescaled row by row to the length m (O,).

    The gradient treats the row lengths as constants (section 4.3 of the paper). With
    dropout, y = linear(x) + DoRA(dropout(x)) - linear(dropout(x)), as in Apple's
    training.
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
        self._base_squares = mx.square(row_lengths(linear))  # (O,)
        self._fixed_factor: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        fixed = self._fixed_factor
        factor = (self._compute_factor() if fixed is None else fixed).astype(x.dtype)
        dropped = self._apply_dropout(x)
        adapted = self._add_update(self.linear(dropped), dropped).astype(x.dtype)
        adapted = adapted * factor
        if dropped is not x:
            adapted = self.linear(x) - self.linear(dropped) + adapted
        return adapted

    def fix_lengths(self) -> None:
        """Compute the row lengths once, for weights that no longer change."""
        self._fixed_factor = self._compute_factor()
        mx.eval(self._fixed_factor, self._base_squares)

    def _compute_factor(self) -> mx.array:
        """Return m / |W + scale (A B)^T| of each row, (O,).

        With |w + b|^2 = |w|^2 + 2 w.b + |b|^2 the sum (O, I) is never stored.
        """
        projected = self.linear(self.lora_a.T.astype(_dtype(self.linear)))  # (R, O)
        products = (projected.astype(mx.float32) * self.lora_b).sum(axis=0)  # w.b
        update = (self.lora_a.T @ self.lora_a) @ self.lora_b  # (R, O)
        update_squares = (update * self.lora_b).sum(axis=0)  # |b|^2
        squares = (
            self._base_squares
            + (2 * self.scale) * products
            + self.scale**2 * update_squares
        )
        return self.m / mx.stop_gradient(mx.sqrt(squares))


class LoRAEmbedding(nn.Module):
    """Embedding with rows E + scale * A B, with A (V, R) and B (R, D).

    `as_linear` is the tied output head, which has the same update.
    """

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


class InputLoRAEmbedding(nn.Module):
    """Embedding with rows E + scale * A B, with A (V, R) and B (R, D).

    `as_linear`, the tied output head, is that of E alone, as in CoreNet and PEFT. As
    mlx-lm has no such layer, the factors have other names, which it refuses.
    """

    def __init__(
        self, embedding: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.lora_embedding_a, self.lora_embedding_b = lora_a, lora_b
        self.scale = scale

    def __call__(self, tokens: mx.array) -> mx.array:
        rows: mx.array = self.embedding(tokens)
        update = self.scale * (self.lora_embedding_a[tokens] @ self.lora_embedding_b)
        return rows + update.astype(rows.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        logits: mx.array = self.embedding.as_linear(x)
        return logits


def adapted_weight(module: nn.Module) -> mx.array:
    """Return the weight (out, in) of a linear or output head, with its adapter.

    An `InputLoRAEmbedding` as head has the weight of its embedding.
    """
    if isinstance(module, InputLoRAEmbedding):
        return adapted_weight(module.embedding)
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
