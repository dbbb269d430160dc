"""Detect and open a model source: its config, and its tensors, read one at a time."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.formats.adapter_reader import Adapter, split_checkpoint
from converters.formats.pickle_machine import PtTensor
from converters.formats.pt_reader import read_checkpoint, read_state_dict
from converters.formats.tensor_readers import note_float64, read_pt_tensor
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.message_parts import cannot_access
from mlx_openelm.model.packed_weights import unpack_weight
from mlx_openelm.model.quantization import Packing, read_packing
from mlx_openelm.paths import user_path
from mlx_openelm.storage.hub import (
    CHECKPOINT_SUFFIXES,
    describe_file,
    find_model,
    refuse_address,
)
from mlx_openelm.storage.model_folder import (
    BEFORE,
    check_dtypes,
    check_shapes,
    expected_shapes,
    read_metadata,
)
from mlx_openelm.storage.weight_files import (
    APPLE_MLX,
    BIN,
    MODEL_LAYOUTS,
    WeightLayout,
    find_weight_files,
)
from mlx_openelm.storage.weight_reader import StoredTensor, check_stored, read_headers
from mlx_openelm.tensor_names import (
    EMBEDDING,
    HEAD,
    map_to_corenet,
    note_buffers,
    to_folder,
    to_module,
)

_LEFT_OUT = "Left out {}, a copy of the tied embedding."
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
    refuse_address(name)
    try:
        path = user_path(name)
        if path.is_file() and revision is None:
            return path
    except (OSError, ValueError) as error:  # too long, or not a valid name
        raise OpenELMError(cannot_access(f"{name!a:.100}", error)) from error
    if path.suffix in CHECKPOINT_SUFFIXES and not path.exists():
        raise OpenELMError(f"{path} does not exist.")
    return find_model(name, offline=offline, revision=revision)


def name_folder(path: Path) -> str:
    """Return the folder's name, or in the Hub cache the repository's."""
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rsplit("--", 1)[-1]
    return path.resolve().name


def open_path(path: Path, weights: str | None = None) -> ModelSource:
    """Open the source at a local path, as `open_source` does.

    Args:
        weights: "model" or "ema", of a checkpoint that has both.
    """
    if path.is_dir():
        if weights is not None:
            raise OpenELMError(
                f"`weights` applies to a .pt file with EMA weights, but {path} is a "
                "folder; leave it out."
            )
        return _open_folder(path)
    if problem := describe_file(path):
        raise OpenELMError(problem)
    return _open_checkpoint(path, weights)


# CoreNet's checkpoints -----------------------------------------------------------


def _open_checkpoint(path: Path, weights: str | None) -> ModelSource:
    checkpoint = read_checkpoint(path, weights)
    read = checkpoint.tensors
    mapped = map_to_corenet(read)
    stored, adapter = split_checkpoint(
        {ours: read[theirs] for ours, theirs in mapped.items()}, path
    )
    tensors = {name: _from_pt(tensor, name) for name, tensor in stored.items()}
    about_tensors = [*note_buffers(read), *_note_precision(stored)]
    head_is_copy = _is_copy(tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config_path = _find_config(path)
    if config_path is None:
        if head_is_copy:
            del tensors[HEAD], shapes[HEAD]
            about_tensors.append(_LEFT_OUT.format(mapped[HEAD]))
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
        if config.share_input_output_layers and HEAD in tensors:
            if not head_is_copy:
                raise _other_head(path, mapped[HEAD], config_path.name)
            del tensors[HEAD], shapes[HEAD]
            about_tensors.append(_LEFT_OUT.format(mapped[HEAD]))
    where = path.name + (f" with {config_path.name}" if config_path else "")
    check_shapes(config.tensor_shapes(), shapes, where=where)
    method = {"lora": "LoRA ", "dora": "DoRA "}[adapter.method] if adapter else ""
    return ModelSource(
        name=path.stem,
        kind=f"CoreNet {method}checkpoint",
        config=config,
        tensors=tensors,
        files=(path,),
        folder=path.parent,
        padded=True,
        notes=(
            *checkpoint.notes,
            *notes,
            *about_tensors,
            *(adapter.notes if adapter else ()),
        ),
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


def _from_pt(stored: PtTensor, name: str) -> SourceTensor:
    if stored.dtype not in _TORCH_FLOATS:
        raise OpenELMError(
            f"{stored.storage.archive.path}: {name} is stored as {stored.dtype}; "
            f"expected {', '.join(_TORCH_FLOATS)}."
        )
    dtype = _TORCH_FLOATS[stored.dtype]
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
    found = find_weight_files(path, MODEL_LAYOUTS)
    stored = (_read_bins if found.layout == BIN else read_headers)(found.files)
    mapped = map_to_corenet(stored)
    notes = [*found.notes, *note_buffers(stored)]
    weights = {ours: stored[theirs] for ours, theirs in mapped.items()}
    by_name = {name: _to_source(tensor, name) for name, tensor in weights.items()}
    notes += _note_precision(weights)
    if config.share_input_output_layers and HEAD in by_name:
        if not _is_copy(by_name):
            raise _other_head(path, mapped[HEAD], config_path.name)
        del by_name[HEAD]
        notes.append(_LEFT_OUT.format(mapped[HEAD]))
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
    headers = {n: t for n, t in stored.items() if isinstance(t, StoredTensor)}
    metadata = read_metadata(raw, config, packings, headers)
    return ModelSource(
        name=name_folder(path),
        kind=_name_kind(
            found.layout, bool(packings), ours=bool(metadata) and BEFORE not in metadata
        ),
        config=config,
        tensors={
            name: _packed(by_name, name, shape, packings[name], model_dtype)
            if name in packings
            else by_name[name]
            for name, shape in config.tensor_shapes().items()
        },
        files=found.files,
        folder=path,
        padded=found.layout == APPLE_MLX,
        metadata=metadata,
        notes=tuple(notes),
    )


def _name_kind(layout: WeightLayout, packed: bool, *, ours: bool) -> str:
    if layout == APPLE_MLX:
        maker = "Apple's MLX"
    elif ours:
        maker = "mlx-openelm"
    elif packed:
        maker = "mlx-lm"
    else:
        maker = "Hugging Face"
    return f"{maker} folder" + (", quantized" if packed else "")


def _read_bins(files: Iterable[Path]) -> dict[str, PtTensor]:
    tensors: dict[str, PtTensor] = {}
    for file in files:
        for name, stored in read_state_dict(file).items():
            if name in tensors:
                raise OpenELMError(
                    f"{name} is in {file} and in another file of {file.parent}; remove "
                    "one of them."
                )
            tensors[name] = stored
    return tensors


def _to_source(stored: StoredTensor | PtTensor, name: str) -> SourceTensor:
    if isinstance(stored, PtTensor):
        return _from_pt(stored, name)
    check_stored({name: stored})
    return SourceTensor(stored.shape, stored.array_dtype, stored.read)


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


def _is_copy(tensors: Mapping[str, SourceTensor]) -> bool:
    """Whether the output head equals the embedding."""
    head, table = tensors.get(HEAD), tensors.get(EMBEDDING)
    return (
        head is not None
        and table is not None
        and head.shape == table.shape
        and bool(mx.array_equal(head.read(), table.read()))
    )


def _other_head(path: Path, stored_name: str, config: str) -> OpenELMError:
    return OpenELMError(
        f"In {path} the config ties the output head to the embedding, but "
        f"{stored_name} differs from it; correct share_input_output_layers in {config}."
    )


def _note_precision(stored: Mapping[str, StoredTensor | PtTensor]) -> tuple[str, ...]:
    return note_float64(sum(t.dtype in ("float64", "F64") for t in stored.values()))
