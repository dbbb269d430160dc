"""Fingerprint of the base weights, stored with an adapter to detect a wrong base.

About 256 weights: a few elements of every linear and of the embedding, evenly spaced
along the diagonal and divided by the root mean square of their rows, so that small and
large tensors count the same. Relative L2 distances, measured on the demo model:

    another dtype     float16 0.0003, bfloat16 0.002
    quantized         8 bits 0.006, 4 bits 0.1, 3 bits 0.2, 2 bits 0.4
    another model     1.4, as between any two random vectors of equal length
"""

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_openelm.config import LLAMA_PIECES
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.packed_weights import unpack_weight
from mlx_openelm.model.quantization import Packing

NUM_ELEMENTS = 256  # in all
SAME = 1e-3  # at most: float16 rounding of the fingerprint or the weights
OTHER = 0.9  # above: another model; halfway between 2 bits and random


@dataclass(frozen=True, slots=True)
class BaseWeight:
    """A weight (rows, width) of a linear or an embedding.

    Attributes:
        read_rows: row numbers (K,) -> dequantized rows (K, width), float32.
    """

    shape: tuple[int, int]
    read_rows: Callable[[mx.array], mx.array]


def fingerprint_base(model: nn.Module) -> str:
    """Return the fingerprint of a model's base, without adapters, as base64."""
    return base64.b64encode(_sample(base_weights(model)).tobytes()).decode()


def base_weights(model: nn.Module) -> dict[str, BaseWeight]:
    """Return the weights of a model's base, by module path.

    In an adapted layer the base is the submodule `linear` or `embedding`. This makes
    its path longer but does not change the order of paths.
    """
    weights = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            weights[path] = _packed_weight(module)
        elif isinstance(module, nn.Linear | nn.Embedding):
            weights[path] = _plain_weight(module.weight)
    return weights


def fingerprint_distance(fingerprint: str, weights: Mapping[str, BaseWeight]) -> float:
    """Return the relative distance of a base: 0 if the same, about 1.4 if unrelated.

    Raises:
        ValueError: the fingerprint is damaged.
    """
    try:
        decoded = np.frombuffer(base64.b64decode(fingerprint, validate=True), "<f2")
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error
    stored, actual = decoded.astype(np.float64), _sample(weights).astype(np.float64)
    length = float(np.linalg.norm(stored))
    if not np.isfinite(length) or length == 0:
        raise ValueError("zero, infinite or NaN")
    if stored.shape != actual.shape:
        return float("inf")
    return float(np.linalg.norm(actual - stored)) / length


def check_base(
    fingerprint: str, weights: Mapping[str, BaseWeight], adapter: Path, base: str | None
) -> tuple[str, ...]:
    """Compare a base with the one that an adapter was trained on.

    Args:
        fingerprint: the fingerprint of the adapter's base.
        base: the name of that base, if the adapter has it.

    Returns:
        Notes for the user; empty if the bases are the same.

    Raises:
        OpenELMError: it is another model, or the fingerprint is damaged.
    """
    named = f", {base}" if base else ""
    try:
        distance = fingerprint_distance(fingerprint, weights)
    except ValueError as error:
        raise OpenELMError(
            f"The base fingerprint in {adapter} is damaged ({error}); copy the adapter "
            "again from where it was trained."
        ) from error
    if not distance <= OTHER:  # NaN counts as another model
        raise OpenELMError(
            f"The adapter {adapter} was trained on another base than this one (their "
            f"weights differ by {distance:.0%}); pass its own base{named}."
        )
    if distance <= SAME:
        return ()
    return (
        f"The adapter was trained on another version of this base{named}: their "
        f"weights differ by {distance:.2%}, as by rounding or further training.",
    )


def _sample(weights: Mapping[str, BaseWeight]) -> npt.NDArray[np.float16]:
    """Return K elements of each of N weights, (N * K,), in order of module path."""
    count = max(1, round(NUM_ELEMENTS / len(weights)))
    parts = [np.array(_elements(weights[path], count)) for path in sorted(weights)]
    return np.concatenate(parts).astype("<f2")


def _elements(weight: BaseWeight, count: int) -> mx.array:
    """Return K elements of a weight's diagonal over the RMS of their rows, (K,)."""
    rows, width = weight.shape
    rows = min(rows, LLAMA_PIECES)  # later rows of an embedding are padding
    middles = [(2 * i + 1) / (2 * count) for i in range(count)]
    read = weight.read_rows(mx.array([int(m * rows) for m in middles]))  # (K, width)
    columns = mx.array([int(m * width) for m in middles])[:, None]  # (K, 1)
    elements = mx.take_along_axis(read, columns, axis=1)[:, 0]
    return elements / mx.maximum(mx.sqrt(mx.square(read).mean()), 1e-20)


def _plain_weight(weight: mx.array) -> BaseWeight:
    count, width = weight.shape
    return BaseWeight((count, width), lambda rows: weight[rows].astype(mx.float32))


def _packed_weight(module: nn.QuantizedLinear | nn.QuantizedEmbedding) -> BaseWeight:
    packing = Packing(module.bits, module.group_size, module.mode)
    parts = {
        name: module[name]
        for name in ("weight", "scales", "biases")
        if module.get(name) is not None
    }
    count, words = parts["weight"].shape

    def read_rows(rows: mx.array) -> mx.array:
        chosen = {name: part[rows] for name, part in parts.items()}
        return unpack_weight(packing, chosen, mx.float32)

    return BaseWeight((count, words * 32 // packing.bits), read_rows)
