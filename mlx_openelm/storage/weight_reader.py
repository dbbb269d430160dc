"""Reads weight files in ranges of bytes, so that a changed file gives an error.

A memory-mapped file that another program truncates would end this one with SIGBUS.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import numpy as np
import safetensors

from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import cannot_access
from mlx_openelm.storage.file_checks import refuse_unreadable
from mlx_openelm.storage.shards import DTYPES

READ_DTYPES = {**DTYPES, "F64": mx.float32}  # dtype in a file -> dtype of the array
_NUMPY = {  # numpy lacks bfloat16
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "U32": "<u4",
    "U8": "u1",
}

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file that must not change until it was read.

    Attributes:
        modified: in nanoseconds.
    """

    path: Path
    size: int
    modified: int

    @classmethod
    def open(cls, path: Path) -> Self:
        """Return a regular file; nothing is read of it.

        Raises:
            OpenELMError: it is missing, may not be read, or stands for another file.
        """
        stat = refuse_unreadable(path)
        return cls(path, stat.st_size, stat.st_mtime_ns)

    def read(self, start: int, length: int) -> Bytes:
        """Return bytes of the file.

        Raises:
            OpenELMError: it cannot be read, or has changed since it was opened.
        """
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                content = np.fromfile(file, np.uint8, length, offset=start)
        except OSError as error:
            raise OpenELMError(cannot_access(self.path, error)) from error
        unchanged = (stat.st_size, stat.st_mtime_ns) == (self.size, self.modified)
        if not unchanged or content.size < length:
            raise OpenELMError(
                f"{self.path} was changed or truncated while it was being read; repeat "
                "the command when it is complete."
            )
        return content


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The header of a tensor in a safetensors file.

    Attributes:
        dtype: as safetensors spells it.
        start: of its bytes in the file.
    """

    file: WeightFile
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def read(self) -> mx.array:
        """Return the tensor, float64 as float32. Raises as `WeightFile.read`."""
        content = self.file.read(self.start, self.num_bytes)
        return to_array(content.view(_NUMPY[self.dtype]).reshape(self.shape))

    @property
    def array_dtype(self) -> mx.Dtype:
        """The dtype of the array that `read` returns."""
        return READ_DTYPES[self.dtype]


def to_array(numbers: np.ndarray[Any, np.dtype[Any]]) -> mx.array:
    """Return numbers of a file; uint16 is bfloat16, and float64 becomes float32."""
    if numbers.dtype == np.uint16:
        return mx.array(numbers).view(mx.bfloat16)
    if numbers.dtype == np.float64:
        with np.errstate(over="ignore"):  # the caller checks for infinity
            return mx.array(numbers.astype(np.float32))
    return mx.array(numbers)


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensor headers of safetensors files by name; no weights are read.

    Raises:
        OpenELMError: a file is damaged, or two have a tensor of the same name.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in _read_header(path).items():
            if name in tensors:
                raise OpenELMError(
                    f"{name} is in {tensors[name].file.path} and in {path.name}; "
                    "remove one of them."
                )
            tensors[name] = tensor
    return tensors


def check_stored(tensors: dict[str, StoredTensor]) -> None:
    """Raise OpenELMError if a tensor has a dtype that weights cannot have."""
    foreign = sorted(n for n, t in tensors.items() if t.dtype not in READ_DTYPES)
    if foreign:
        raise OpenELMError(
            f"{foreign[0]} is stored as {tensors[foreign[0]].dtype} in "
            f"{tensors[foreign[0]].file.path}; an OpenELM is stored as "
            f"{', '.join(READ_DTYPES)}."
        )


def _read_header(path: Path) -> dict[str, StoredTensor]:
    file = WeightFile.open(path)
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # it checks all of the header
    except (safetensors.SafetensorError, OSError) as error:
        raise OpenELMError(
            f"{path} is damaged or not a safetensors file ({error}); download or "
            "convert it again."
        ) from error
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    header = json.loads(file.read(8, length).tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = StoredTensor(
            file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start
        )
    return tensors
