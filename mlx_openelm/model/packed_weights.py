"""Quantization and dequantization of one weight, as a `Packing` describes."""

from collections.abc import Mapping

import mlx.core as mx

from mlx_openelm.model.quantization import Packing


def pack_weight(packing: Packing, weight: mx.array) -> dict[str, mx.array]:
    """Return the packed weight, its scales and its biases, by name suffix."""
    packed = mx.quantize(
        weight, group_size=packing.group_size, bits=packing.bits, mode=packing.mode
    )
    return dict(zip(("weight", "scales", "biases"), packed, strict=False))


def unpack_weight(
    packing: Packing, parts: Mapping[str, mx.array], dtype: mx.Dtype
) -> mx.array:
    """Return the dequantized weight (out, in), rounded once, to `dtype`.

    mx.dequantize alone would compute in the dtype of the scales.
    """
    scales, biases = parts["scales"], parts.get("biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        parts["weight"],
        scales,
        biases,
        group_size=packing.group_size,
        bits=packing.bits,
        mode=packing.mode,
        dtype=mx.float32,
    ).astype(dtype)
