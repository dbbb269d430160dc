"""Weights in a few bits and back, as a `Packing` says."""

from collections.abc import Mapping

import mlx.core as mx

from mlx_openelm.model.quantization import Packing


def pack_weight(packing: Packing, weight: mx.array) -> dict[str, mx.array]:
    """Return the packed weight and what decodes it, by the suffix of its name."""
    packed = mx.quantize(
        weight, group_size=packing.group_size, bits=packing.bits, mode=packing.mode
    )
    return dict(zip(("weight", "scales", "biases"), packed, strict=False))


def unpack_weight(
    packing: Packing, parts: Mapping[str, mx.array], dtype: mx.Dtype
) -> mx.array:
    """Return the weight (out, in) that the packed parts stand for.

    Rounded once, to `dtype`: mx.dequantize alone computes in the dtype of the scales.
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
