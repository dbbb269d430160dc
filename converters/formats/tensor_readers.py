"""Read single tensors of a file as MLX arrays."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from converters.formats.pickle_machine import PtTensor


def read_safetensor(file: Path, name: str) -> mx.array:
    """Return a tensor of a .safetensors file, lazily: only its own bytes are read."""
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    return loaded[name]


def read_pt_tensor(stored: PtTensor) -> mx.array:
    """Return a tensor of a torch file, float64 as float32."""
    if stored.dtype == "bfloat16":
        return mx.array(stored.array).view(mx.bfloat16)
    if stored.dtype != "float64":
        return mx.array(stored.array)
    with np.errstate(over="ignore"):  # the caller checks for infinity
        return mx.array(stored.array.astype(np.float32))
