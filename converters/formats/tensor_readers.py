"""Read the tensors of torch's files as MLX arrays."""

import mlx.core as mx

from converters.formats.pickle_machine import PtTensor
from mlx_openelm.storage.weight_reader import to_array


def read_pt_tensor(stored: PtTensor) -> mx.array:
    """Return a tensor, float64 as float32. Raises as `PtTensor.read`."""
    return to_array(stored.read())
