"""Adapters that are trained on the rounded weights that `fuse` will write.

The forward pass uses the weight with its adapter, rounded to few bits; the gradient is
that of the layer without rounding (straight-through: Bengio et al., 1308.3432).
"""

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.lora import DoRALinear, LoRALinear, adapted_weight
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.packed_weights import pack_weight, unpack_weight
from mlx_openelm.model.quantization import Packing, Quantization
from mlx_openelm.tensor_names import to_module


def round_layers(
    model: OpenELM, bits: int, stored: mx.Dtype, packed: Mapping[str, Packing]
) -> None:
    """Replace all layers that `fuse` will quantize by layers that round.

    An adapted embedding is not rounded: it has 8 bits, whose error is small. Nor is a
    layer without adapter that the base has in this packing: `fuse` copies it, and to
    round it again would change it.

    Args:
        model: has its adapter, without dropout.
        bits: of the linear layers; the embedding has the default of quantization.
        stored: dtype of the weights before they are quantized.
        packed: packings of the base, by CoreNet name.

    Raises:
        OpenELMError: the rows of a tensor cannot be divided into groups.
    """
    try:
        packings = Quantization(bits).packings(model.config)
    except OpenELMError as error:
        raise OpenELMError(
            f"`quantize_aware` {bits} is not possible for this model: {error}"
        ) from error
    modules, rounded = dict(model.named_modules()), []
    for name, packing in packings.items():
        path = to_module(name)
        module, rounding = modules[path], Rounding(packing, stored)
        layer: nn.Module
        if isinstance(module, DoRALinear):
            layer = _RoundedDoRALinear(module, rounding)
        elif isinstance(module, LoRALinear):
            layer = _RoundedLoRALinear(module, rounding)
        elif packed.get(name) == packing:
            continue
        elif isinstance(module, nn.Linear | nn.QuantizedLinear):
            layer = _RoundedLinear(module, rounding)
        elif isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            layer = _RoundedEmbedding(module, rounding)
        else:
            continue
        trained = module.trainable_parameters()
        layer.freeze()
        layer.unfreeze(keys=list(trained), recurse=False)
        rounded.append((path, layer))
    model.update_modules(tree_unflatten(rounded))


class Rounding:
    """Rounds a weight as `fuse` does, by its packing and dtype."""

    def __init__(self, packing: Packing, stored: mx.Dtype) -> None:
        self._packing, self._stored = packing, stored

    def __call__(self, weight: mx.array) -> mx.array:
        """Return the weight after packing and unpacking, float32."""
        parts: Mapping[str, mx.array] = pack_weight(
            self._packing, weight.astype(mx.float32).astype(self._stored)
        )
        return unpack_weight(self._packing, parts, mx.float32)


class _RoundedLoRALinear(LoRALinear):
    def __init__(self, layer: LoRALinear, rounding: Rounding) -> None:
        super().__init__(layer.linear, layer.lora_a, layer.lora_b, layer.scale)
        self._round = rounding

    def __call__(self, x: mx.array) -> mx.array:
        smooth = super().__call__(mx.stop_gradient(x))
        return _straight_through(self, x, smooth, self._round)


class _RoundedDoRALinear(DoRALinear):
    def __init__(self, layer: DoRALinear, rounding: Rounding) -> None:
        super().__init__(layer.linear, layer.lora_a, layer.lora_b, layer.scale, layer.m)
        self._round = rounding

    def __call__(self, x: mx.array) -> mx.array:
        smooth = super().__call__(mx.stop_gradient(x))
        return _straight_through(self, x, smooth, self._round)


def _straight_through(
    layer: nn.Module, x: mx.array, smooth: mx.array, rounding: Rounding
) -> mx.array:
    """Return the output of the rounded weight, with the gradient of `smooth`.

    The gradient by x is that of the rounded weight, which is computed again for it.

    Args:
        smooth: output of the layer without rounding, without a gradient by x.
    """

    def multiply(x: mx.array) -> mx.array:
        weight = mx.stop_gradient(rounding(adapted_weight(layer)))
        return x @ weight.T.astype(x.dtype)

    out: mx.array = mx.checkpoint(multiply)(x)
    return out + (smooth - mx.stop_gradient(smooth))


class _RoundedLayer(nn.Module):
    """A layer that is not trained, beside its rounded weight.

    Attributes:
        base: the layer; the fingerprint of the base is taken of it.
    """

    def __init__(self, base: nn.Module, rounding: Rounding) -> None:
        super().__init__()
        self.base = base
        self.rounded = rounding(adapted_weight(base))

    @property
    def weight(self) -> mx.array:
        rounded: mx.array = self.rounded
        return rounded

    def _multiply(self, x: mx.array) -> mx.array:
        return x @ self.rounded.T.astype(x.dtype)


class _RoundedLinear(_RoundedLayer):
    def __call__(self, x: mx.array) -> mx.array:
        return self._multiply(x)


class _RoundedEmbedding(_RoundedLayer):
    def __init__(self, base: nn.Module, rounding: Rounding) -> None:
        super().__init__(base, rounding)
        packed = isinstance(base, nn.QuantizedEmbedding)
        self._dtype = (base.scales if packed else base.weight).dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        rows: mx.array = self.rounded[tokens].astype(self._dtype)
        return rows

    def as_linear(self, x: mx.array) -> mx.array:
        return self._multiply(x)
