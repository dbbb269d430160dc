"""Model folders in mlx-lm's format: opening, checking and lazy reading.

Our metadata is the entry "mlx_openelm" of config.json: the origin of the weights and
their prompt template.
"""

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.message_parts import list_names
from mlx_openelm.model.packed_weights import unpack_weight
from mlx_openelm.model.quantization import Packing, read_packing
from mlx_openelm.storage.chat_template_file import read_chat_template
from mlx_openelm.storage.shards import DTYPES, Shard, TensorLayout
from mlx_openelm.storage.weight_files import (
    ADAPTER_CONFIG,
    SAFETENSORS,
    find_weight_files,
)
from mlx_openelm.storage.weight_reader import StoredTensor, check_stored, read_headers
from mlx_openelm.tensor_names import (
    HEAD,
    map_to_corenet,
    split_buffers,
    to_folder,
    to_module,
)
from mlx_openelm.text.chat_templates import recognize

METADATA_KEY = "mlx_openelm"
BEFORE = "before"  # in our metadata: the entry before another tool changed the weights

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
MOST_NAMED = 10  # tensors of a kind that an error lists


@dataclass(frozen=True, slots=True)
class ConfiguredFolder:
    """A folder of a model or of an adapter, with our metadata in its config.

    Attributes:
        raw: config.json, or adapter_config.json.
    """

    path: Path
    raw: Mapping[str, Any]

    @property
    def metadata(self) -> Mapping[str, Any]:
        entry = self.raw.get(METADATA_KEY)
        return entry if isinstance(entry, dict) else {}

    @property
    def template(self) -> str | None:
        """The prompt template that it was trained with."""
        name = self.metadata.get("template")
        if isinstance(name, str):
            return name
        return recognize(read_chat_template(self.path) or "")


@dataclass(frozen=True, slots=True)
class ModelFolder(ConfiguredFolder):
    """A model on disk; its headers were read, its weights were not.

    Attributes:
        tensors: headers by the names in the files.
        packings: how the quantized tensors are packed, by CoreNet name.
        unused: names of other weight files in the folder.
        notes: notes for the user, for example on these files.
    """

    config: OpenELMConfig
    tensors: Mapping[str, StoredTensor]
    packings: Mapping[str, Packing]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def metadata(self) -> Mapping[str, Any]:
        return read_metadata(self.raw, self.config, self.packings, self.tensors)

    @property
    def generation_defaults(self) -> dict[str, Any]:
        path = self.path / "generation_config.json"
        return read_mapping(path) if path.is_file() else {}

    def dtype_of(self, name: str) -> mx.Dtype:
        """Return the dtype of a tensor (CoreNet name) that is not packed."""
        return self.tensors[to_folder(name)].array_dtype

    def read(self) -> dict[str, mx.array]:
        """Return all tensors, lazily: the bytes are read on evaluation."""
        arrays: dict[str, mx.array] = {}
        for file in sorted({tensor.file.path for tensor in self.tensors.values()}):
            loaded = mx.load(str(file))
            assert isinstance(loaded, dict)
            arrays |= loaded
        return {name: arrays[name] for name in self.tensors}


def open_folder(path: Path) -> ModelFolder:
    """Open a model folder and check every header against the config.

    Raises:
        OpenELMError: no config or weights, a damaged file, an index that does not match
            the files, or tensors that do not match the config (all are named).
    """
    raw = read_mapping(_existing(path / "config.json"))
    config = OpenELMConfig.from_dict(raw)
    found = find_weight_files(path)
    tensors = read_headers(found.files)
    entry = raw.get("quantization") or raw.get("quantization_config") or {}
    packings = {
        name: read_packing(entry, to_module(name))
        for name in config.tensor_shapes()
        if f"{to_module(name)}.scales" in tensors
    }
    expected = expected_shapes(config, packings)
    _refuse_foreign(path, tensors, expected)
    check_stored(tensors)
    check_shapes(
        expected,
        {name: tensor.shape for name, tensor in tensors.items()},
        where=str(path),
    )
    dtypes = {name: tensor.array_dtype for name, tensor in tensors.items()}
    check_dtypes(config, packings, dtypes, where=str(path))
    return ModelFolder(path, raw, config, tensors, packings, found.unused, found.notes)


def read_metadata(
    raw: Mapping[str, Any],
    config: OpenELMConfig,
    packings: Mapping[str, Packing],
    tensors: Mapping[str, StoredTensor],
) -> Mapping[str, Any]:
    """Return our entry of config.json, as far as it describes these weights.

    Another tool that writes other weights copies the entry. Then only the prompt
    template still applies, and the entry becomes `BEFORE` of the result.
    """
    entry = raw.get(METADATA_KEY)
    if not isinstance(entry, dict):
        return {}
    hashed = entry.get("files")
    files = {tensor.file.path.name: tensor.file for tensor in tensors.values()}
    described = [name for name in hashed or () if str(name).endswith(".safetensors")]
    order = [name for name in expected_shapes(config, packings) if name in tensors]
    if not described or (
        set(described) == files.keys()
        and all(_is_ours(name, tensors, order) for name in files)
    ):
        return entry
    template = {"template": entry["template"]} if "template" in entry else {}
    return {**template, BEFORE: entry}


def _is_ours(
    file: str, tensors: Mapping[str, StoredTensor], order: Iterable[str]
) -> bool:
    """Whether a file has the tensors in the order and the size that we write.

    Its metadata may be damaged; then the hash differs.
    """
    stored = {n: tensors[n] for n in order if tensors[n].file.path.name == file}
    if any(tensor.dtype not in DTYPES for tensor in stored.values()) or not stored:
        return False
    if sorted(stored, key=lambda name: stored[name].start) != list(stored):
        return False
    layouts = {n: TensorLayout(t.array_dtype, t.shape) for n, t in stored.items()}
    shard, opened = Shard(file, layouts), next(iter(stored.values())).file
    headers = (len(shard.header(format)) for format in ("mlx", "pt"))
    return opened.size - shard.num_bytes in headers


def _refuse_foreign(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise OpenELMError for names and dtypes that `convert` changes to ours."""
    weights, _ = split_buffers(tensors)
    names = {to_folder(name) for name in map_to_corenet(weights)}
    foreign = sorted(tensors.keys() - expected.keys())
    foreign += [name for name, tensor in tensors.items() if tensor.dtype == "F64"]
    if foreign and expected.keys() <= names <= expected.keys() | {HEAD}:
        raise OpenELMError(
            f"{path} has tensors as another tool stores them, for example "
            f"{foreign[0]}; `mlx-openelm convert {shlex.quote(str(path))}` makes a "
            "model folder of it."
        )


def expected_shapes(
    config: OpenELMConfig, packings: Mapping[str, Packing]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the folder, with packed ones as parts."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in config.tensor_shapes().items():
        packing = packings.get(name)
        parts = {"weight": shape} if packing is None else packing.part_shapes(shape)
        expected |= {f"{to_module(name)}.{part}": s for part, s in parts.items()}
    return expected


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    actual: Mapping[str, tuple[int, ...]],
    *,
    where: str,
) -> None:
    """Compare tensors by name and shape.

    Raises:
        OpenELMError: names the missing, unexpected and misshapen tensors, up to
            `MOST_NAMED` of each kind.
    """
    missing = [name for name in expected if name not in actual]
    unexpected = sorted(name for name in actual if name not in expected)
    misshapen = [
        f"{name} is {list(actual[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in actual and actual[name] != shape
    ]
    problems = [
        f"{kind}: {list_names(_summarize(names), most=MOST_NAMED, quoted=False)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise OpenELMError(
            f"The tensors of {where} do not match its config; {'; '.join(problems)}."
        )


def _summarize(names: list[str]) -> list[str]:
    """Return many names with one entry for all layers: "layers.*.ffn_norm.weight"."""
    if len(names) <= MOST_NAMED:
        return names
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def check_dtypes(
    config: OpenELMConfig,
    packings: Mapping[str, Packing],
    actual: Mapping[str, mx.Dtype],
    *,
    where: str,
) -> None:
    """Check that packed tensors have packed dtypes and all others are floats.

    Raises:
        OpenELMError: names the first tensor with a wrong dtype.
    """
    for name in config.tensor_shapes():
        packing, module = packings.get(name), to_module(name)
        wanted: dict[str, tuple[mx.Dtype, ...]] = {f"{module}.weight": FLOATS}
        if packing is not None:
            scales = FLOATS if packing.mode == "affine" else (mx.uint8,)
            wanted = {f"{module}.weight": (mx.uint32,), f"{module}.scales": scales}
            if packing.mode == "affine":
                wanted[f"{module}.biases"] = FLOATS
        for tensor, dtypes in wanted.items():
            if actual[tensor] not in dtypes:
                spelled = " or ".join(map(spell_dtype, dtypes))
                raise OpenELMError(
                    f"{where}: {tensor} is stored as {spell_dtype(actual[tensor])}, "
                    f"expected {spelled} {'as packed' if packing else 'without scales'}"
                    "; download or convert it again."
                )


_BITS = {  # float dtype -> unsigned dtype of the same size, bits of infinity
    mx.float32: (mx.uint32, 0x7F800000),
    mx.float16: (mx.uint16, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7F80),
}


def is_finite(array: mx.array) -> bool:
    """Return whether no element of a float array is infinite or NaN.

    Infinity and NaN have the largest exponent and so, for each sign, the largest bits.
    Two passes of numpy's maximum find them, 30 times as fast as mx.isfinite on the
    Linux CPU.
    """
    if array.size == 0:
        return True
    unsigned, infinity = _BITS[array.dtype]
    bits = np.array(array.view(unsigned), copy=False)
    sign = 1 << (8 * bits.itemsize - 1)
    positive = bits.view(f"i{bits.itemsize}")  # negative floats are below 0 here
    return bool(positive.max() < infinity and bits.max() < infinity + sign)


def unpacks_to_finite(
    packing: Packing, parts: Mapping[str, mx.array], dtype: mx.Dtype
) -> bool:
    """Return whether no dequantized element is infinite or NaN in `dtype`."""
    if packing.mode != "affine":
        return is_finite(unpack_weight(packing, parts, dtype))
    first = parts["biases"].astype(mx.float32)  # code 0 of each group
    last = parts["scales"].astype(mx.float32) * (2**packing.bits - 1) + first
    return all(is_finite(end.astype(dtype)) for end in (first, last))


def spell_dtype(dtype: mx.Dtype) -> str:
    """Return "bfloat16" for mx.bfloat16, as in configs."""
    return str(dtype).removeprefix("mlx.core.")


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    folder = path.parent
    absent = f"{folder} holds no {path.name}"
    if (folder / ADAPTER_CONFIG).is_file():
        raise OpenELMError(
            f"{absent}, it is an adapter; merge it into its base: "
            f"`mlx-openelm fuse --adapter-path {shlex.quote(str(folder))} "
            f"--save-path {shlex.quote(f'{folder.resolve().name}-fused')}`."
        )
    if any(folder.glob(SAFETENSORS.pattern)):
        raise OpenELMError(f"{absent}; copy it there from where the weights are from.")
    raise OpenELMError(
        f"{absent}; pass a model folder. `mlx-openelm convert` makes one of a .pt file "
        "or a Hub id."
    )
