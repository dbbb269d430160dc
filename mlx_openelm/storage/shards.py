"""Streaming writer of a model folder's weights, in safetensors files (shards).

The layout is known before the first tensor is computed. The header of a shard is
written first and each tensor follows at once, so at most one tensor waits in memory. A
shard is renamed to its final name when it is complete on the disk. A shard with its
final name is therefore complete, and an interrupted conversion resumes after it.

A safetensors file is the length of the header (8 bytes, little-endian), the header (a
JSON mapping from names to dtype, shape and offsets), and the tensors without gaps.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import mlx.core as mx

from mlx_openelm.storage.staging import SHARD_FILES, flush
from mlx_openelm.storage.weight_files import INDEX

SHARD_BYTES = 10**9

DTYPES = {  # supported dtypes, by their names in safetensors
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Dtype (one of `DTYPES`) and shape of a tensor, before it is computed."""

    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True, slots=True)
class Shard:
    """A file and its tensors, in the order of their bytes."""

    name: str
    tensors: Mapping[str, TensorLayout]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors, without the header."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def header(self, format: str) -> bytes:
        """Return the header with its length; readers require the format."""
        entries: dict[str, Any] = {"__metadata__": {"format": format}}
        start = 0
        for name, tensor in self.tensors.items():
            end = start + tensor.num_bytes
            entries[name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": tensor.shape,
                "data_offsets": (start, end),
            }
            start = end
        encoded = json.dumps(entries, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # aligns the tensors to 8 bytes
        return len(encoded).to_bytes(8, "little") + encoded


def plan_shards(
    layout: Mapping[str, TensorLayout], shard_bytes: int = SHARD_BYTES
) -> list[Shard]:
    """Distribute tensors, in order, to files of at most `shard_bytes` each.

    A larger tensor has its own file.
    """
    groups: list[dict[str, TensorLayout]] = [{}]
    num_bytes = 0
    for name, tensor in layout.items():
        num_bytes += tensor.num_bytes
        if groups[-1] and num_bytes > shard_bytes:
            groups.append({})
            num_bytes = tensor.num_bytes
        groups[-1][name] = tensor
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tensors)
        for i, tensors in enumerate(groups, start=1)
    ]


class ShardWriter:
    """Writes the tensors of a layout, one after another, into a folder.

    Writing and hashing run on a second thread while the next tensor is computed;
    leaving the `with` block waits for that thread.

    Attributes:
        whole: names of the tensors that the folder already has, in complete shards.
        hashes: "sha256:..." of each shard by its file name; complete after `close`.
    """

    def __init__(
        self,
        folder: Path,
        layout: Mapping[str, TensorLayout],
        *,
        shard_bytes: int = SHARD_BYTES,
        format: Literal["mlx", "pt"] = "mlx",
    ) -> None:
        self._folder, self._format = folder, format
        self._shards = plan_shards(layout, shard_bytes)
        whole = [shard for shard in self._shards if self._is_whole(shard)]
        for path in set(folder.glob(SHARD_FILES)) - {folder / s.name for s in whole}:
            path.unlink()
        self.whole = frozenset(name for shard in whole for name in shard.tensors)
        self.hashes: dict[str, str] = {}
        self._expected = self._steps()
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._running = [self._worker.submit(self._hash_shard, s.name) for s in whole]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.shutdown()
        if self._file is not None:
            self._file.close()

    def add(self, name: str, array: mx.array) -> None:
        """Write the next tensor of the layout that is not in `whole`.

        Raises:
            OSError: this tensor or the one before it cannot be written.
            ValueError: it is not the next tensor of the layout.
        """
        shard, expected = next(self._expected, (None, None))
        if shard is None or name != expected:
            raise ValueError(f"{name} came where the layout has {expected}")
        actual = TensorLayout(array.dtype, array.shape)
        if actual != shard.tensors[name]:
            raise ValueError(f"{name} is {actual}, not {shard.tensors[name]}")
        # A view of the bytes; a copy only if they are not contiguous.
        content = memoryview(array.flatten().view(mx.uint8))  # type: ignore[arg-type]
        self._wait()
        self._running.append(self._worker.submit(self._write, shard, name, content))

    def close(self, num_parameters: int) -> None:
        """Wait until everything is on the disk, and write the index.

        Raises:
            OSError: a file cannot be written.
            ValueError: a tensor of the layout was not added.
        """
        _, missing = next(self._expected, (None, None))
        if missing is not None:
            raise ValueError(f"{missing} of the layout was not added")
        self._wait()
        total = sum(shard.num_bytes for shard in self._shards)
        weight_map = {n: shard.name for shard in self._shards for n in shard.tensors}
        index = {
            "metadata": {"total_parameters": num_parameters, "total_size": total},
            "weight_map": weight_map,
        }
        write_json(self._folder / INDEX, index)

    def _steps(self) -> Iterator[tuple[Shard, str]]:
        for shard in self._shards:
            for name in shard.tensors:
                if name not in self.whole:
                    yield shard, name

    def _wait(self) -> None:
        running: list[Future[None]] = self._running
        while running:
            running.pop().result()

    def _is_whole(self, shard: Shard) -> bool:
        """Return whether the file exists with exactly the planned layout."""
        path, header = self._folder / shard.name, shard.header(self._format)
        if not path.is_file() or path.is_symlink():
            return False
        if path.stat().st_size != len(header) + shard.num_bytes:
            return False
        with path.open("rb") as opened:
            return opened.read(len(header)) == header

    # On the second thread:

    def _write(self, shard: Shard, name: str, content: memoryview) -> None:
        names, part = list(shard.tensors), self._folder / f"{shard.name}.part"
        if name == names[0]:
            self._file, self._hash = part.open("wb", buffering=0), hashlib.sha256()
            self._put(self._file, memoryview(shard.header(self._format)))
        assert self._file is not None
        self._put(self._file, content)
        if name == names[-1]:
            self._file.close()
            flush(part)
            part.rename(self._folder / shard.name)
            self.hashes[shard.name] = f"sha256:{self._hash.hexdigest()}"

    def _put(self, file: BinaryIO, content: memoryview) -> None:
        self._hash.update(content)
        while content:  # a write may be partial
            content = content[file.write(content) :]

    def _hash_shard(self, name: str) -> None:
        with (self._folder / name).open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        self.hashes[name] = f"sha256:{digest}"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON as mlx-lm does: sorted keys, indented by four."""
    path.write_text(json.dumps(value, indent=4, sort_keys=True) + "\n")
