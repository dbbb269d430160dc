"""A sketch of a base model, by which an adapter knows its own base again.

Some 256 weights stand for all: of every linear and of the embedding a few elements,
evenly spread over the diagonal, in units of their rows' root mean square, so that small
tensors count like large ones. Distances (relative L2), measured on the demo model:

    another dtype     float16 0.0003, bfloat16 0.002
    packed            8 bits 0.006, 4 bits 0.1, 3 bits 0.2, 2 bits 0.4
    another model     1.4, as of any two random directions
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
SAME = 1e-3  # up to this nothing but float16's rounding, of the sketch or the weights
OTHER = 0.9  # above this another model: halfway from 2 bits to random


@dataclass(frozen=True, slots=True)
class BaseWeight:
    """A weight (rows, width) of a linear or an embedding.

    Attributes:
        read_rows: row numbers (K,) -> the rows (K, width), unpacked, in float32.
    """

    shape: tuple[int, int]
    read_rows: Callable[[mx.array], mx.array]


def sketch_base(model: nn.Module) -> str:
    """Return the sketch of a model's base, its adapters left out, as text."""
    return base64.b64encode(_sketch(base_weights(model)).tobytes()).decode()


def base_weights(model: nn.Module) -> dict[str, BaseWeight]:
    """Return what a model's base is known by, by module path.

    An adapter's layer holds its base as `linear` or `embedding`; that makes the path
    longer and leaves the order of paths as it is.
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            found[path] = _packed_weight(module)
        elif isinstance(module, nn.Linear | nn.Embedding):
            found[path] = _plain_weight(module.weight)
    return found


def sketch_distance(sketch: str, weights: Mapping[str, BaseWeight]) -> float:
    """Return how far a base is from a sketch: 0 for the same one, about 1.4 for others.

    Raises:
        ValueError: this is no sketch.
    """
    try:
        known = np.frombuffer(base64.b64decode(sketch, validate=True), "<f2")
    except binascii.Error as error:
        raise ValueError(f"no base64: {error}") from error
    known, found = known.astype(np.float64), _sketch(weights).astype(np.float64)
    length = float(np.linalg.norm(known))
    if not np.isfinite(length) or length == 0:
        raise ValueError("no direction")
    if known.shape != found.shape:
        return float("inf")
    return float(np.linalg.norm(found - known)) / length


def check_base(
    sketch: str, weights: Mapping[str, BaseWeight], adapter: Path, base: str | None
) -> tuple[str, ...]:
    """Compare a base with the one that an adapter was trained on.

    Args:
        sketch: of that one; `base` is its name, where the adapter says it.

    Returns:
        What a person should know: nothing, where it is the same.

    Raises:
        OpenELMError: it is another model, or the sketch is damaged.
    """
    named = f", {base}" if base else ""
    try:
        distance = sketch_distance(sketch, weights)
    except ValueError as error:
        raise OpenELMError(
            f"The sketch of its base that {adapter} holds is damaged ({error}); copy "
            "the adapter again from where it was trained."
        ) from error
    if not distance <= OTHER:  # NaN is no base either
        raise OpenELMError(
            f"The adapter {adapter} was trained on another base than this one (their "
            f"weights differ by {distance:.0%}); give its own base{named}."
        )
    if distance <= SAME:
        return ()
    return (
        f"The adapter was trained on another version of this base{named}: their "
        f"weights differ by {distance:.2%}, as by rounding or further training.",
    )


def _sketch(weights: Mapping[str, BaseWeight]) -> npt.NDArray[np.float16]:
    """Return the sketch (N * K,) of N weights, module by module in order of path."""
    count = max(1, round(NUM_ELEMENTS / len(weights)))
    parts = [np.array(_elements(weights[path], count)) for path in sorted(weights)]
    return np.concatenate(parts).astype("<f2")


def _elements(weight: BaseWeight, count: int) -> mx.array:
    """Return `count` elements of a weight's diagonal, in units of their rows' size."""
    rows, width = weight.shape
    rows = min(rows, LLAMA_PIECES)  # behind these an embedding has padding or nothing
    middles = [(2 * i + 1) / (2 * count) for i in range(count)]
    read = weight.read_rows(mx.array([int(m * rows) for m in middles]))  # (K, width)
    columns = mx.array([int(m * width) for m in middles])[:, None]
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
