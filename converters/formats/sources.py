"""Detect and open a model source: its config, and its tensors, read one at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.formats.adapter_reader import Adapter, split_checkpoint
from converters.formats.pickle_machine import PtTensor
from converters.formats.pt_reader import read_state_dict
from converters.formats.tensor_readers import read_pt_tensor, read_safetensor
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.model.packed_weights import unpack_weight
from mlx_openelm.model.quantization import Packing, read_packing
from mlx_openelm.paths import user_path
from mlx_openelm.storage.adapter_folder import CONFIG
from mlx_openelm.storage.hub import find_model
from mlx_openelm.storage.model_folder import (
    DTYPES,
    METADATA_KEY,
    check_dtypes,
    check_shapes,
    expected_shapes,
    find_weight_files,
    read_headers,
)
from mlx_openelm.tensor_names import (
    EMBEDDING,
    HEAD,
    map_to_corenet,
    to_folder,
    to_module,
)

APPLE_WEIGHTS = "weights.safetensors"  # of Apple's own MLX folders
BIN_FILES, BIN_INDEX = "pytorch_model*.bin", "pytorch_model.bin.index.json"
PT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
NORM = "norm.weight"  # never packed: its dtype is the model's

_TORCH_FLOATS = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "float64": mx.float32,  # MLX supports float64 only on the CPU
}


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor (out, in) of a source.

    Attributes:
        dtype: as stored; of a packed tensor: the dtype of the unpacked ones.
        read: reads it; unpacks a packed tensor to float32.
        packing: of a packed tensor; `read_parts` reads its parts, by suffix.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[], mx.array]
    packing: Packing | None = None
    read_parts: Callable[[], dict[str, mx.array]] | None = None


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that can be converted.

    Attributes:
        kind: description of the detected format.
        tensors: by CoreNet name, exactly those of `config`.
        files: the weight files.
        folder: where to look for a tokenizer and generation_config.json.
        padded: the vocabulary includes CoreNet's padding rows.
        metadata: the mlx-openelm entry of config.json.
        notes: notes for the user.
        adapter: the adapter in the file, not merged into `tensors`.
        before_merging: the base's versions of the tensors with a merged adapter.
    """

    name: str
    kind: str
    config: OpenELMConfig
    tensors: Mapping[str, SourceTensor]
    files: tuple[Path, ...]
    folder: Path
    padded: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    adapter: Adapter | None = None
    before_merging: Mapping[str, SourceTensor] = field(default_factory=dict)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the unpacked tensors."""
        table = self.tensors[EMBEDDING]
        return self.tensors[NORM].dtype if table.packing else table.dtype


def open_source(
    name: str, *, offline: bool = False, revision: str | None = None
) -> ModelSource:
    """Open a CoreNet .pt file, or a folder of Hugging Face, mlx-lm or Apple's MLX.

    Raises:
        OpenELMError: the source does not exist, is not an OpenELM, or does not match
            its config.
    """
    return open_path(locate(name, offline=offline, revision=revision))


def locate(name: str, *, offline: bool = False, revision: str | None = None) -> Path:
    """Return the path of a file, folder or Hub id, which is downloaded."""
    try:
        path = user_path(name)
        if path.is_file() and revision is None:
            return path
    except (OSError, ValueError) as error:  # too long, or not a valid name
        reason = error.strerror if isinstance(error, OSError) else error
        raise OpenELMError(
            f"{name!a:.100} is not a file or folder: {reason}."
        ) from error
    if path.suffix in PT_SUFFIXES and not path.exists():
        raise OpenELMError(f"{path} does not exist.")
    return find_model(name, offline=offline, revision=revision)


def name_folder(path: Path) -> str:
    """Return the folder's name, or in the Hub cache the repository's."""
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rsplit("--", 1)[-1]
    return path.resolve().name


def is_adapter(path: Path) -> bool:
    """Whether a folder is an adapter, not a model."""
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def open_path(path: Path) -> ModelSource:
    """Open the source at a local path, as `open_source` does."""
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        raise OpenELMError(
            f"{path} is one file of a model folder; pass the folder, {path.parent}."
        )
    if path.suffix == ".gguf":
        raise OpenELMError(
            f"{path} is a GGUF file, which can only be written; convert its source "
            "instead."
        )
    return _open_checkpoint(path)


# CoreNet's checkpoints -----------------------------------------------------------


def _open_checkpoint(path: Path) -> ModelSource:
    read = read_state_dict(path)
    mapped = map_to_corenet(read)
    stored, adapter = split_checkpoint(
        {ours: read[theirs] for ours, theirs in mapped.items()}, path
    )
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    config_path = _find_config(path)
    if config_path is None:
        config = OpenELMConfig.from_shapes(shapes)
        notes = [
            "No config next to the file: using OpenELM's context length 2048, RoPE "
            "base 10000 and eps 1e-6."
        ]
    else:
        config = OpenELMConfig.from_file(config_path)
        rows, *_ = shapes.get(EMBEDDING) or (config.vocab_size,)
        config = replace(config, vocab_size=rows)  # often padded
        notes = [f"Sizes from {config_path.name}."]
    where = path.name + (f" with {config_path.name}" if config_path else "")
    check_shapes(config.tensor_shapes(), shapes, where=where)
    method = {"lora": "LoRA ", "dora": "DoRA "}[adapter.method] if adapter else ""
    return ModelSource(
        name=path.stem,
        kind=f"CoreNet {method}checkpoint",
        config=config,
        tensors={name: _from_pt(t, name, path) for name, t in stored.items()},
        files=(path,),
        folder=path.parent,
        padded=True,
        notes=(*notes, *(adapter.notes if adapter else ())),
        adapter=adapter,
    )


def _find_config(path: Path) -> Path | None:
    """Find CoreNet's YAML or the config.json of `pretrain` next to a .pt file."""
    names = (f"{path.stem}.yaml", "config.yaml", "config.json")
    for candidate in (path.with_name(name) for name in names):
        if candidate.is_file() and _is_openelm(read_mapping(candidate)):
            return candidate
    return None


def _is_openelm(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "openelm" or any(
        str(key).split(".")[0] == "model" for key in config
    )


def _from_pt(stored: PtTensor, name: str, path: Path) -> SourceTensor:
    dtype = _float_dtype(stored.dtype, name, path)
    return SourceTensor(stored.shape, dtype, partial(read_pt_tensor, stored))


# Folders -------------------------------------------------------------------------


def _open_folder(path: Path) -> ModelSource:
    config_path = path / "config.json"
    if not config_path.is_file():
        raise OpenELMError(
            f"{path} has no config.json; expected a CoreNet .pt file or a folder in "
            "Hugging Face's layout."
        )
    raw = read_mapping(config_path)
    config = OpenELMConfig.from_dict(raw)
    files = _find_files(path)
    stored = _read_bins(files) if files[0].suffix == ".bin" else _read_tensors(files)
    mapped = map_to_corenet(stored)
    by_name = {ours: stored[theirs] for ours, theirs in mapped.items()}
    notes: tuple[str, ...] = ()
    if config.share_input_output_layers and HEAD in by_name:
        _refuse_other_head(path, by_name, mapped[HEAD])
        del by_name[HEAD]
        notes = (f"Left out {mapped[HEAD]}, a copy of the tied embedding.",)
    entry = raw.get("quantization") or raw.get("quantization_config") or {}
    packings = {
        name: read_packing(entry, to_module(name))
        for name in config.tensor_shapes()
        if f"{name.removesuffix('.weight')}.scales" in by_name
    }
    if not packings:  # errors then show the names of the tool that wrote the folder
        expected = config.tensor_shapes()
        shapes = {name: tensor.shape for name, tensor in by_name.items()}
    else:
        expected = expected_shapes(config, packings)
        shapes = {to_folder(name): tensor.shape for name, tensor in by_name.items()}
    check_shapes(expected, shapes, where=str(path))
    dtypes = {to_folder(name): tensor.dtype for name, tensor in by_name.items()}
    check_dtypes(config, packings, dtypes, where=str(path))
    model_dtype = by_name[NORM].dtype
    metadata = raw.get(METADATA_KEY)
    return ModelSource(
        name=name_folder(path),
        kind=_name_kind(raw, files, bool(packings)),
        config=config,
        tensors={
            name: _packed(by_name, name, shape, packings[name], model_dtype)
            if name in packings
            else by_name[name]
            for name, shape in config.tensor_shapes().items()
        },
        files=tuple(files),
        folder=path,
        padded=files[0].name == APPLE_WEIGHTS,
        metadata=metadata if isinstance(metadata, dict) else {},
        notes=notes,
    )


def _find_files(path: Path) -> list[Path]:
    """Return a folder's weight files: .safetensors if it has any, else .bin."""
    if any(path.glob("model*.safetensors")):
        return find_weight_files(path)
    if (path / APPLE_WEIGHTS).is_file():
        return [path / APPLE_WEIGHTS]
    if (path / BIN_INDEX).is_file() or any(path.glob(BIN_FILES)):
        return find_weight_files(path, BIN_FILES, BIN_INDEX)
    checkpoints = sorted(file.name for file in path.glob("[!.]*.pt"))
    if checkpoints:  # of a training run, or grown
        raise OpenELMError(
            f"{path} has no model*.safetensors, only {', '.join(checkpoints[:8])}; "
            f"pass one of them, for example {path / checkpoints[0]}."
        )
    return find_weight_files(path)


def _name_kind(raw: Mapping[str, Any], files: list[Path], packed: bool) -> str:
    if files[0].name == APPLE_WEIGHTS:
        maker = "Apple's MLX"
    elif METADATA_KEY in raw:
        maker = "mlx-openelm"
    elif packed:
        maker = "mlx-lm"
    else:
        maker = "Hugging Face"
    return f"{maker} folder" + (", quantized" if packed else "")


def _read_tensors(files: list[Path]) -> dict[str, SourceTensor]:
    return {
        name: SourceTensor(
            header.shape,
            DTYPES[header.dtype],
            partial(read_safetensor, header.file, name),
        )
        for name, header in read_headers(files).items()
    }


def _read_bins(files: list[Path]) -> dict[str, SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        for name, stored in read_state_dict(file).items():
            if name in tensors:
                raise OpenELMError(
                    f"{name} is in {file} and in another file of {file.parent}; remove "
                    "one of them."
                )
            tensors[name] = _from_pt(stored, name, file)
    return tensors


def _packed(
    stored: Mapping[str, SourceTensor],
    name: str,
    shape: tuple[int, ...],
    packing: Packing,
    dtype: mx.Dtype,
) -> SourceTensor:
    module = name.removesuffix(".weight")
    suffixes = [s for s in ("weight", "scales", "biases") if f"{module}.{s}" in stored]

    def read_parts() -> dict[str, mx.array]:
        return {suffix: stored[f"{module}.{suffix}"].read() for suffix in suffixes}

    def read() -> mx.array:
        return unpack_weight(packing, read_parts(), mx.float32)

    return SourceTensor(shape, dtype, read, packing, read_parts)


def _refuse_other_head(
    path: Path, by_name: Mapping[str, SourceTensor], stored_name: str
) -> None:
    head, table = by_name[HEAD], by_name.get(EMBEDDING)
    if table is None or not mx.array_equal(head.read(), table.read()):
        raise OpenELMError(
            f"In {path} the config ties the output head to the embedding, but "
            f"{stored_name} differs from it; correct share_input_output_layers in "
            "config.json."
        )


def _float_dtype(dtype: str, name: str, path: Path) -> mx.Dtype:
    if dtype not in _TORCH_FLOATS:
        raise OpenELMError(
            f"{path}: {name} is stored as {dtype}; expected float32, float16 or "
            "bfloat16."
        )
    return _TORCH_FLOATS[dtype]
