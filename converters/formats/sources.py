"""Detect and open a model source: its config, and its tensors, read one at a time."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from converters.formats.adapter_reader import Adapter, split_checkpoint
from converters.formats.checkpoint_weights import find_config, is_copied_head
from converters.formats.pickle_machine import PtTensor
from converters.formats.pt_reader import read_checkpoint
from converters.formats.tensor_readers import note_float64, read_pt_tensor
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.message_parts import cannot_access
from mlx_openelm.model.packed_weights import unpack_weight
from mlx_openelm.model.quantization import Packing, read_packing
from mlx_openelm.paths import user_path
from mlx_openelm.storage.address_download import download_address, public_address
from mlx_openelm.storage.hub import (
    CHECKPOINT_SUFFIXES,
    describe_file,
    find_model,
    find_released,
    is_file_address,
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
    WeightFiles,
    WeightLayout,
    find_weight_files,
    is_adapter,
)
from mlx_openelm.storage.weight_reader import StoredTensor, check_stored, read_headers
from mlx_openelm.tensor_names import (
    EMBEDDING,
    HEAD,
    map_to_corenet,
    split_buffers,
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


def read_float32(tensor: SourceTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Read a tensor as float32."""
    return np.array(tensor.read().astype(mx.float32))


def open_source(
    name: str, *, offline: bool = False, revision: str | None = None
) -> ModelSource:
    """Open a CoreNet .pt file, or a folder of Hugging Face, mlx-lm or Apple's MLX.

    Raises:
        OpenELMError: the source does not exist, is not an OpenELM, or does not match
            its config.
    """
    return open_path(locate(name, offline=offline, revision=revision))


def locate(
    name: str,
    *,
    offline: bool = False,
    revision: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Return the path of a file or folder; a Hub id or an address is downloaded.

    Args:
        name: path, Hub id, https address of a checkpoint, or name of a released model.
        on_progress: called with the downloaded and all bytes of an address.
    """
    if is_file_address(name):
        if revision is not None:
            raise OpenELMError(
                f"`revision` applies to a Hub id, not to {shown_name(name)}."
            )
        return download_address(name, offline=offline, on_progress=on_progress)
    refuse_address(name)
    try:
        path = user_path(name)
        if path.is_file() and revision is None:
            return path
    except (OSError, ValueError) as error:  # too long, or not a valid name
        raise OpenELMError(cannot_access(f"{name!a:.100}", error)) from error
    if path.suffix in CHECKPOINT_SUFFIXES and not path.exists():
        raise OpenELMError(f"{path} does not exist.")
    if not path.exists():
        name = find_released(name) or name
    return find_model(name, offline=offline, revision=revision)


def shown_name(name: str) -> str:
    """Return the name of a source for messages: without the secrets of an address."""
    return public_address(name) if is_file_address(name) else name


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
        return _open_folder(path, weights)
    if problem := describe_file(path):
        raise OpenELMError(problem)
    return _open_checkpoint(path, weights)


def open_without_adapter(path: Path) -> ModelSource:
    """Open a source as `open_path` does, if it neither is nor contains an adapter.

    Raises:
        OpenELMError: see `open_path`; the command that merges the adapter is named.
    """
    source = open_path(path)
    if source.adapter is not None:
        raise OpenELMError(_describe_adapter(path, "contains"))
    return source


def _describe_adapter(path: Path, verb: str) -> str:
    return (
        f"{path} {verb} an adapter, and a model is needed; `mlx-openelm convert "
        f"{shlex.quote(str(path))} --merge` merges it into its base."
    )


# CoreNet's checkpoints -----------------------------------------------------------


def _open_checkpoint(path: Path, weights: str | None) -> ModelSource:
    checkpoint = read_checkpoint(path, weights)
    read, left_out = split_buffers(checkpoint.tensors)
    mapped = map_to_corenet(read)
    stored, adapter = split_checkpoint(
        {ours: read[theirs] for ours, theirs in mapped.items()}, path
    )
    tensors = {name: _from_pt(tensor, name) for name, tensor in stored.items()}
    about_tensors = [*left_out, *_note_precision(stored)]
    config_path = find_config(path)
    config = None if config_path is None else OpenELMConfig.from_file(config_path)
    if HEAD in tensors and (config is None or config.share_input_output_layers):
        if _is_copy(tensors):
            _drop_head(tensors)
            about_tensors.append(_LEFT_OUT.format(mapped[HEAD]))
        elif config_path is not None:
            raise _other_head(path, mapped[HEAD], config_path.name)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if config is None or config_path is None:
        config = OpenELMConfig.from_shapes(shapes)
        notes = [
            "No config next to the file: using OpenELM's context length 2048, RoPE "
            "base 10000 and eps 1e-6."
        ]
    else:
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


def _from_pt(stored: PtTensor, name: str) -> SourceTensor:
    if stored.dtype not in _TORCH_FLOATS:
        raise OpenELMError(
            f"{stored.storage.archive.path}: {name} is stored as {stored.dtype}; "
            f"expected {', '.join(_TORCH_FLOATS)}."
        )
    dtype = _TORCH_FLOATS[stored.dtype]
    return SourceTensor(stored.shape, dtype, partial(read_pt_tensor, stored))


# Folders -------------------------------------------------------------------------


def _open_folder(path: Path, weights: str | None) -> ModelSource:
    if is_adapter(path):
        raise OpenELMError(_describe_adapter(path, "is"))
    config_path = path / "config.json"
    if not config_path.is_file():
        raise OpenELMError(
            f"{path} has no config.json; expected a CoreNet .pt file or a folder in "
            "Hugging Face's layout."
        )
    raw = read_mapping(config_path)
    config = OpenELMConfig.from_dict(raw)
    found = find_weight_files(path, MODEL_LAYOUTS)
    read, choice = _read_files(found, weights)
    stored, left_out = split_buffers(read)
    mapped = map_to_corenet(stored)
    renamed = {ours: stored[theirs] for ours, theirs in mapped.items()}
    by_name = {name: _to_source(tensor, name) for name, tensor in renamed.items()}
    notes = [*found.notes, *choice, *left_out, *_note_precision(renamed)]
    if config.share_input_output_layers and HEAD in by_name:
        if not _is_copy(by_name):
            raise _other_head(path, mapped[HEAD], config_path.name)
        rows = _drop_head(by_name)
        config = replace(config, vocab_size=rows)  # of one that is not padded
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


def _read_files(
    found: WeightFiles, weights: str | None
) -> tuple[Mapping[str, StoredTensor | PtTensor], tuple[str, ...]]:
    """Return the tensors of weight files, and notes on which weights they are."""
    folder = found.files[0].parent
    if found.layout != BIN:
        if weights is not None:
            raise OpenELMError(
                f"`weights` applies to a .pt file with EMA weights, but {folder} is a "
                "folder of safetensors files; leave it out."
            )
        return read_headers(found.files), ()
    tensors: dict[str, PtTensor] = {}
    notes: list[str] = []
    for file in found.files:
        checkpoint = read_checkpoint(file, weights)
        if twice := tensors.keys() & checkpoint.tensors.keys():
            raise OpenELMError(
                f"{min(twice)} is in {file} and in another file of {folder}; remove "
                "one of them."
            )
        tensors |= checkpoint.tensors
        notes += checkpoint.notes
    return tensors, tuple(dict.fromkeys(notes))


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
    """Whether the output head is a copy of the embedding."""
    head, table = tensors.get(HEAD), tensors.get(EMBEDDING)
    return (
        head is not None
        and table is not None
        and head.shape[1:] == table.shape[1:]
        and is_copied_head(head.read(), table.read(), mx.array.astype)
    )


def _drop_head(tensors: dict[str, SourceTensor]) -> int:
    """Remove a copied head, and the padding rows that it lacks; return the rows."""
    head, table = tensors.pop(HEAD), tensors[EMBEDDING]
    rows = min(head.shape[0], table.shape[0])
    if rows < table.shape[0]:
        tensors[EMBEDDING] = replace(
            table, shape=(rows, *table.shape[1:]), read=lambda: table.read()[:rows]
        )
    return rows


def _other_head(path: Path, stored_name: str, config: str) -> OpenELMError:
    return OpenELMError(
        f"In {path} the config ties the output head to the embedding, but "
        f"{stored_name} differs from it; correct share_input_output_layers in {config}."
    )


def _note_precision(stored: Mapping[str, StoredTensor | PtTensor]) -> tuple[str, ...]:
    return note_float64(sum(t.dtype in ("float64", "F64") for t in stored.values()))
