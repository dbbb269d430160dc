"""Read the tensors of torch's files as MLX arrays."""

import mlx.core as mx

from converters.formats.pickle_machine import PtTensor
from mlx_openelm.message_parts import count_of
from mlx_openelm.storage.weight_reader import to_array


def read_pt_tensor(stored: PtTensor) -> mx.array:
    """Return a tensor, float64 as float32. Raises as `PtTensor.read`."""
    return to_array(stored.read())


def note_float64(count: int) -> tuple[str, ...]:
    """Return a note for the user on the tensors that are rounded to float32."""
    note = f"Read {count_of(count, 'tensor')} of float64 as float32."
    return (note,) if count else ()
