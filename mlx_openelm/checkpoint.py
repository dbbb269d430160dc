"""The model folder, as mlx-lm reads it: opened, checked, read lazily, written.

Its metadata lives under "mlx_openelm" in config.json: where the weights came from and
which prompt template belongs to them.
"""

import errno
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import safetensors

from mlx_openelm.config import OpenELMConfig, read_mapping
from mlx_openelm.errors import OpenELMError
from mlx_openelm.names import to_folder
from mlx_openelm.quantize import Packing, read_packing

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 10**9
METADATA_KEY = "mlx_openelm"

DTYPES = {  # safetensors' spelling of what an OpenELM may be stored in
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a safetensors file: where it is, and what its header says."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].size


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on disk whose headers were read and whose weights were not.

    Attributes:
        raw: config.json.
        tensors: by the names in the files.
        packings: how the quantized tensors are packed, by CoreNet name.
    """

    path: Path
    config: OpenELMConfig
    raw: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    packings: Mapping[str, Packing]

    @property
    def metadata(self) -> Mapping[str, Any]:
        found = self.raw.get(METADATA_KEY)
        return found if isinstance(found, dict) else {}

    @property
    def template(self) -> str | None:
        found = self.metadata.get("template")
        return found if isinstance(found, str) else None

    @property
    def generation_defaults(self) -> dict[str, Any]:
        path = self.path / "generation_config.json"
        return read_mapping(path) if path.is_file() else {}

    def read(self) -> dict[str, mx.array]:
        """Return every tensor, lazily: bytes are read when it is evaluated."""
        arrays: dict[str, mx.array] = {}
        for file in sorted({tensor.file for tensor in self.tensors.values()}):
            loaded = mx.load(str(file))
            assert isinstance(loaded, dict)
            arrays |= loaded
        return {name: arrays[name] for name in self.tensors}


def open_folder(path: Path) -> ModelFolder:
    """Open a model folder and check every header against the config.

    Raises:
        OpenELMError: no config or weights, a damaged file, an index that does not match
            the files, or tensors that do not match the config (all of them named).
    """
    raw = read_mapping(_existing(path / "config.json"))
    config = OpenELMConfig.from_dict(raw)
    tensors = read_headers(find_weight_files(path))
    entry = raw.get("quantization") or raw.get("quantization_config") or {}
    packings = {
        name: read_packing(entry, _module(name))
        for name in config.tensor_shapes()
        if f"{_module(name)}.scales" in tensors
    }
    check_shapes(
        expected_shapes(config, packings),
        {name: tensor.shape for name, tensor in tensors.items()},
        where=str(path),
    )
    unpacked = (to_folder(name) for name in config.tensor_shapes().keys() - packings)
    whole = sorted(name for name in unpacked if tensors[name].dtype in ("U32", "U8"))
    if whole:
        raise OpenELMError(
            f"{path}: {whole[0]} is stored as {tensors[whole[0]].dtype}, as if it were "
            "packed, but has no scales; download or convert it again."
        )
    return ModelFolder(path, config, raw, tensors, packings)


def find_weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a folder, which the index must confirm."""
    files = sorted(path.glob("model*.safetensors"))
    index = path / INDEX
    if index.is_file():
        weight_map = read_mapping(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise OpenELMError(
                f"{index} has no weight_map; download or convert it again."
            )
        missing = sorted(
            {str(name) for name in weight_map.values()} - {f.name for f in files}
        )
        if missing:
            raise OpenELMError(
                f"{path} is incomplete: {', '.join(missing)} of its index is missing; "
                "download or convert it again."
            )
        return [file for file in files if file.name in weight_map.values()]
    if not files:
        raise OpenELMError(
            f"{path} holds no model*.safetensors; is it a model folder? "
            "`mlx-openelm convert` makes one."
        )
    return files


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of safetensors files by name; no weight is read.

    Raises:
        OpenELMError: a file is damaged, or of a dtype that no OpenELM has.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    part = opened.get_slice(name)
                    if name in tensors:
                        raise OpenELMError(
                            f"{name} is in {tensors[name].file} and in {file.name}; "
                            "remove one of them."
                        )
                    tensors[name] = StoredTensor(
                        file, part.get_dtype(), tuple(part.get_shape())
                    )
        except (safetensors.SafetensorError, OSError) as error:
            raise OpenELMError(
                f"{file} is damaged or no safetensors file ({error}); download or "
                "convert it again."
            ) from error
    foreign = sorted(n for n, t in tensors.items() if t.dtype not in DTYPES)
    if foreign:
        raise OpenELMError(
            f"{foreign[0]} is stored as {tensors[foreign[0]].dtype}; an OpenELM is "
            f"stored as {', '.join(DTYPES)}."
        )
    return tensors


def expected_shapes(
    config: OpenELMConfig, packings: Mapping[str, Packing]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the folder, packed ones in their parts."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in config.tensor_shapes().items():
        packing = packings.get(name)
        if packing is None:
            expected[to_folder(name)] = shape
            continue
        out, width = shape
        module = _module(name)
        expected[f"{module}.weight"] = (out, width * packing.bits // 32)
        expected[f"{module}.scales"] = (out, width // packing.group_size)
        if packing.mode == "affine":
            expected[f"{module}.biases"] = (out, width // packing.group_size)
    return expected


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    where: str,
) -> None:
    """Compare tensors by name and shape.

    Raises:
        OpenELMError: missing, unexpected and misshapen tensors, all in one message.
    """
    missing = [name for name in expected if name not in found]
    unexpected = sorted(name for name in found if name not in expected)
    misshapen = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{kind}: {', '.join(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise OpenELMError(
            f"The tensors of {where} are not those of its config; "
            f"{'; '.join(problems)}."
        )


@dataclass(slots=True)
class ShardWriter:
    """Writes tensors as they come, into files of at most `shard_bytes` each."""

    folder: Path
    shard_bytes: int = SHARD_BYTES
    _pending: dict[str, mx.array] = field(default_factory=dict)
    _shards: list[list[str]] = field(default_factory=list)
    _total_bytes: int = 0

    def add(self, name: str, array: mx.array) -> None:
        pending_bytes = sum(held.nbytes for held in self._pending.values())
        if self._pending and pending_bytes + array.nbytes > self.shard_bytes:
            self._write_shard()
        self._pending[name] = array
        self._total_bytes += array.nbytes

    def close(self, num_parameters: int) -> None:
        """Write the rest, give the files their final names, and the index."""
        self._write_shard()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards, start=1):
            final = (
                "model.safetensors"
                if count == 1
                else f"model-{i:05d}-of-{count:05d}.safetensors"
            )
            self._part(i).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        write_json(
            self.folder / INDEX,
            {
                "metadata": {
                    "total_parameters": num_parameters,
                    "total_size": self._total_bytes,
                },
                "weight_map": weight_map,
            },
        )

    def _write_shard(self) -> None:
        self._shards.append(list(self._pending))
        path = self._part(len(self._shards))
        try:
            mx.save_safetensors(str(path), self._pending, metadata={"format": "mlx"})
        except RuntimeError as error:
            free = shutil.disk_usage(self.folder).free
            full = free < sum(array.nbytes for array in self._pending.values())
            reason = f"{path.name}: {str(error).rstrip('.')}"
            raise OSError(errno.ENOSPC if full else errno.EIO, reason) from error
        self._pending = {}

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON as mlx-lm does: sorted keys, indented by four."""
    path.write_text(json.dumps(value, indent=4, sort_keys=True) + "\n")


def _module(corenet_name: str) -> str:
    return to_folder(corenet_name).removesuffix(".weight")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise OpenELMError(
            f"{path.parent} holds no {path.name}; is it a model folder? "
            "`mlx-openelm convert` makes one."
        )
    return path
