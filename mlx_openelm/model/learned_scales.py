"""Layers with packed weights whose scales and biases can be trained.

The packed integers stay. With q the integers of a group, m their mean, and s0 and b0
the scale and bias of rounding:

    scale = s0 (1 + a)        bias = b0 + (s0 - scale) m + s0 c

so a stretches the group about its mean and c shifts it, both in proportion to the step
between two integers. Both start at 0. Letters:

    O  outputs (of an embedding: its rows)    I  inputs    G  groups in a row
"""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_openelm.model.quantization import Packing


class LearnedScales(nn.Module):
    """A packed weight (O, I), unpacked in each forward and each backward pass.

    Attributes:
        a, c: trained, float32 (O, G).

    Args:
        parts: weight, scales and biases as stored.
        dtype: of the activations.
    """

    def __init__(
        self, packing: Packing, parts: Mapping[str, mx.array], dtype: mx.Dtype
    ) -> None:
        super().__init__()
        self._packing, self._packed = packing, parts["weight"]
        self._stored, self._dtype = parts["scales"].dtype, dtype
        self._scales = parts["scales"].astype(mx.float32)
        self._biases = parts["biases"].astype(mx.float32)
        one, zero = mx.ones_like(self._scales), mx.zeros_like(self._scales)
        integers = self._unpack(self._packed, one, zero)  # (O, I)
        self._mean = integers.reshape(*one.shape, packing.group_size).mean(axis=-1)
        self.a, self.c = zero, zero
        mx.eval(self._mean, self.a, self.c)

    def stored_parts(self) -> dict[str, mx.array]:
        """Return the trained scales and biases in the dtype of the stored ones."""
        scales, biases = self._exact_parts()
        return {
            "scales": scales.astype(self._stored),
            "biases": biases.astype(self._stored),
        }

    @property
    def num_tokens(self) -> int:
        """O: the tokens of an output head."""
        rows: int = self._packed.shape[0]
        return rows

    def weight(self) -> mx.array:
        """Return the unpacked weight, float32 (O, I)."""
        return self._unpack(self._packed, *self.parts())

    def unpack(self, block: slice, parts: Sequence[mx.array]) -> mx.array:
        """Return rows of the weight, float32, from the same rows of `parts()`."""
        scales, biases = parts
        return self._unpack(self._packed[block], scales, biases)

    def _exact_parts(self) -> tuple[mx.array, mx.array]:
        scales = self._scales * (1 + self.a)
        shift = (self._scales - scales) * self._mean + self._scales * self.c
        return scales, self._biases + shift

    def parts(self) -> list[mx.array]:
        """Return scales and biases as stored; the gradient ignores the rounding."""
        return [
            exact + mx.stop_gradient(exact.astype(self._stored) - exact)
            for exact in self._exact_parts()
        ]

    def _unpack(self, packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return mx.dequantize(
            packed,
            scales,
            biases,
            group_size=self._packing.group_size,
            bits=self._packing.bits,
        )

    def _multiply(self, x: mx.array) -> mx.array:
        """Return x weight^T; neither the weight nor its gradient is kept.

        The gradient by x depends on those by scales and biases, so that one layer after
        another unpacks its weight.
        """

        @mx.custom_function
        def multiply(x: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
            return x @ self._unpack(self._packed, scales, biases).T.astype(x.dtype)

        @multiply.vjp
        def multiply_vjp(
            primals: tuple[mx.array, mx.array, mx.array],
            cotangent: mx.array,
            output: mx.array,
        ) -> tuple[mx.array, mx.array, mx.array]:
            x, scales, biases = primals
            scales, biases = mx.depends([scales, biases], [cotangent])

            def unpack(scales: mx.array, biases: mx.array) -> mx.array:
                return self._unpack(self._packed, scales, biases)

            rows = cotangent.reshape(-1, cotangent.shape[-1]).astype(mx.float32)
            by_weight = rows.T @ x.reshape(-1, x.shape[-1]).astype(mx.float32)  # (O, I)
            (weight,), (by_scales, by_biases) = mx.vjp(
                unpack, [scales, biases], [by_weight]
            )
            by_x = cotangent @ weight.astype(x.dtype)
            by_x = mx.depends(by_x, [by_scales, by_biases])
            return by_x, by_scales, by_biases

        product: mx.array = multiply(x, *self.parts())  # type: ignore[assignment] # untyped
        return product


class LearnedLinear(LearnedScales):
    """y = x weight^T."""

    def __call__(self, x: mx.array) -> mx.array:
        return self._multiply(x)


class LearnedEmbedding(LearnedScales):
    """Rows of the weight; `as_linear` is the tied output head."""

    def __call__(self, tokens: mx.array) -> mx.array:
        scales, biases = self.parts()
        rows = tokens.reshape(-1)
        unpacked = self._unpack(self._packed[rows], scales[rows], biases[rows])
        return unpacked.reshape(*tokens.shape, -1).astype(self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._multiply(x)
