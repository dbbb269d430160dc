"""Write files of torch.save without torch, one tensor in memory at a time.

The format is that of `pt_reader`: a zip of uncompressed records, `archive/data.pkl`
with a pickle of a dict from names to calls of `_rebuild_tensor_v2`, and
`archive/data/N` with the numbers of tensor N, aligned to 64 bytes for
torch.load(mmap=True). torch uses the folder name `archive` for streams without a file
name; with it, the bytes do not depend on the file's name.
"""

import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np

ALIGNMENT = 64  # bytes, torch's own since 2.8

_STORAGES = {
    mx.float32: "FloatStorage",
    mx.float16: "HalfStorage",
    mx.bfloat16: "BFloat16Storage",
}


@dataclass(frozen=True, slots=True)
class TensorToWrite:
    """A tensor that is read just before it is written.

    Attributes:
        dtype: float32, float16 or bfloat16.
        read: called once; returns an array of exactly this shape and dtype.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[], mx.array]


def write_pt(
    path: Path,
    tensors: Mapping[str, TensorToWrite],
    *,
    on_written: Callable[[str], None] = lambda name: None,
) -> None:
    """Write the equivalent of torch.save({name: tensor, ...}, path).

    Args:
        on_written: called with each tensor's name once it is in the file.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, file, "data.pkl", _describe(tensors))
        _add(archive, file, ".format_version", b"1")
        _add(archive, file, ".storage_alignment", str(ALIGNMENT).encode())
        _add(archive, file, "byteorder", b"little")
        for i, (name, tensor) in enumerate(tensors.items()):
            _add(archive, file, f"data/{i}", to_numpy(read_checked(name, tensor)))
            on_written(name)
        _add(archive, file, "version", b"3\n")


def read_checked(name: str, tensor: TensorToWrite) -> mx.array:
    """Read a tensor, and check that it has the declared shape and dtype.

    Raises:
        ValueError: it has not, which is a bug of the caller.
    """
    array = tensor.read()
    if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
        raise ValueError(
            f"{name} was declared as {tensor.dtype} {tensor.shape} and is "
            f"{array.dtype} {array.shape}"
        )
    return array


def to_numpy(array: mx.array) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a row-major array; bfloat16, which numpy lacks, is viewed as uint16."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.asarray(mx.contiguous(array))


# The zip -----------------------------------------------------------------------------


def _add(
    archive: zipfile.ZipFile,
    file: IO[bytes],
    name: str,
    content: bytes | np.ndarray[Any, np.dtype[Any]],
) -> None:
    """Add a record whose content is aligned to `ALIGNMENT`."""
    record = zipfile.ZipInfo(f"archive/{name}")
    # A header (30 bytes), the name and two extra fields precede the content: this
    # padding (kind and length: 4 bytes) and zipfile's 64-bit sizes (20 bytes).
    before = file.tell() + 30 + len(record.filename) + 4 + 20
    padding = -before % ALIGNMENT
    record.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(record, "w", force_zip64=True) as opened:
        opened.write(content if isinstance(content, bytes) else content.data)


# The pickle --------------------------------------------------------------------------


def _describe(tensors: Mapping[str, TensorToWrite]) -> bytes:
    """Return the pickle of the dict, which refers to storages by record name."""
    items = (
        _plain(name) + _rebuilding(str(i), tensor)
        for i, (name, tensor) in enumerate(tensors.items())
    )
    opcodes = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK
    opcodes += b"".join(items) + pickle.SETITEMS + pickle.STOP
    return pickletools.optimize(opcodes)


def _rebuilding(record: str, tensor: TensorToWrite) -> bytes:
    """Return the opcodes of torch's call that rebuilds a tensor."""
    size = math.prod(tensor.shape)
    strides = tuple(
        math.prod(tensor.shape[i:]) for i in range(1, len(tensor.shape) + 1)
    )
    kind = _global("torch", _STORAGES[tensor.dtype])
    storage = _tuple(_plain("storage"), kind, *map(_plain, (record, "cpu", size)))
    no_hooks = _global("collections", "OrderedDict") + _tuple() + pickle.REDUCE
    arguments = _tuple(
        storage + pickle.BINPERSID,
        *map(_plain, (0, tensor.shape, strides, False)),  # offset, ..., requires_grad
        no_hooks,
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _plain(value: object) -> bytes:
    """Return the opcodes that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]  # without PROTO 2 and STOP


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
