"""What lies at a path: an OpenELM's config and its tensors, to be read one by one."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from converters.pt_file import PtTensor, read_state_dict
from mlx_openelm.checkpoint import (
    check_shapes,
    find_weight_files,
    read_headers,
)
from mlx_openelm.config import OpenELMConfig, read_mapping
from mlx_openelm.errors import OpenELMError
from mlx_openelm.hub import find_model
from mlx_openelm.names import EMBEDDING, HEAD, map_to_corenet

_FLOATS = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "float64": mx.float32,  # no OpenELM needs it and MLX hardly has it
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
}


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor (out, in) of a source; `read` brings it into memory."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[], mx.array]


@dataclass(frozen=True, slots=True)
class Source:
    """A model that can be converted.

    Attributes:
        kind: what it was recognised as, in words.
        tensors: by CoreNet name, exactly those of `config`.
        files: the weight files.
        folder: where a tokenizer and a generation_config.json may lie.
        notes: what a person should know.
    """

    name: str
    kind: str
    config: OpenELMConfig
    tensors: Mapping[str, SourceTensor]
    files: tuple[Path, ...]
    folder: Path
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> mx.Dtype:
        return self.tensors[EMBEDDING].dtype


def open_source(
    name: str, *, offline: bool = False, revision: str | None = None
) -> Source:
    """Recognise a CoreNet .pt file or a folder in Hugging Face's or mlx-lm's layout.

    Raises:
        OpenELMError: nothing is there, it is no OpenELM, or it contradicts its config.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        if path.suffix == ".safetensors":
            raise OpenELMError(
                f"{path} is one file of a model folder; convert all of {path.parent}."
            )
        return _open_pt(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        raise OpenELMError(f"There is no file {path}.")
    return _open_folder(find_model(name, offline=offline, revision=revision))


def _open_pt(path: Path) -> Source:
    stored = read_state_dict(path)
    mapped = map_to_corenet(stored)
    _refuse_adapters(mapped, path)
    shapes = {ours: stored[theirs].shape for ours, theirs in mapped.items()}
    given = _config_beside(path)
    if given is None:
        config = OpenELMConfig.from_shapes(shapes)
        notes = (
            "No config beside the file: context length 2048, RoPE base 10000 and eps "
            "1e-6 are OpenELM's own.",
        )
    else:
        config = OpenELMConfig.from_file(given)
        rows, *_ = shapes.get(EMBEDDING) or (config.vocab_size,)
        config = replace(config, vocab_size=rows)  # often padded
        notes = (f"Sizes from {given.name}.",)
    where = path.name if given is None else f"{path.name}, read with {given.name},"
    check_shapes(config.tensor_shapes(), shapes, where=where)
    tensors = {
        ours: _from_pt(stored[theirs], theirs, path) for ours, theirs in mapped.items()
    }
    return Source(
        name=path.stem,
        kind="CoreNet checkpoint",
        config=config,
        tensors=tensors,
        files=(path,),
        folder=path.parent,
        notes=notes,
    )


def _open_folder(path: Path) -> Source:
    config_path = path / "config.json"
    if not config_path.is_file():
        raise OpenELMError(
            f"{path} holds no config.json; expected a CoreNet .pt file or a folder in "
            "Hugging Face's layout."
        )
    raw = read_mapping(config_path)
    config = OpenELMConfig.from_dict(raw)
    files = find_weight_files(path)
    headers = read_headers(files)
    if any(name.endswith(".scales") for name in headers):
        raise OpenELMError(
            f"{path} is quantized already; this version converts unquantized weights "
            "only."
        )
    mapped = map_to_corenet(headers)
    _refuse_adapters(mapped, path)
    notes: tuple[str, ...] = ()
    if config.share_input_output_layers and HEAD in mapped:
        _refuse_other_head(files, headers, mapped)
        del mapped[HEAD]
        notes = ("Left out lm_head.weight, a copy of the tied embedding.",)
    check_shapes(
        config.tensor_shapes(),
        {ours: headers[theirs].shape for ours, theirs in mapped.items()},
        where=str(path),
    )
    tensors = {
        ours: SourceTensor(
            headers[theirs].shape,
            _float_dtype(headers[theirs].dtype, theirs, path),
            _reader(headers[theirs].file, theirs),
        )
        for ours, theirs in mapped.items()
    }
    return Source(
        name=_hub_name(path),
        kind="model folder",
        config=config,
        tensors=tensors,
        files=tuple(files),
        folder=path,
        notes=notes,
    )


def _config_beside(path: Path) -> Path | None:
    """CoreNet's YAML or our pretrain's config.json, where the .pt file lies."""
    names = (f"{path.stem}.yaml", "config.yaml", "config.json")
    for candidate in (path.with_name(name) for name in names):
        if candidate.is_file() and _is_openelm(read_mapping(candidate)):
            return candidate
    return None


def _is_openelm(found: Mapping[str, Any]) -> bool:
    return found.get("model_type") == "openelm" or any(
        str(key).split(".")[0] == "model" for key in found
    )


def _refuse_adapters(names: Mapping[str, str], path: Path) -> None:
    adapted = [theirs for ours, theirs in names.items() if ".base_layer." in ours]
    if adapted:
        raise OpenELMError(
            f"{path} carries LoRA or DoRA adapters ({adapted[0]}, say), which this "
            "version does not convert."
        )


def _refuse_other_head(
    files: list[Path], headers: Mapping[str, Any], mapped: Mapping[str, str]
) -> None:
    head, table = mapped[HEAD], mapped[EMBEDDING]
    first = _reader(headers[head].file, head)()
    second = _reader(headers[table].file, table)()
    if not mx.array_equal(first, second):
        raise OpenELMError(
            f"{files[0].parent} says that the output head is tied to the embedding, "
            f"but {head} differs from it; correct share_input_output_layers in "
            "config.json."
        )


def _from_pt(stored: PtTensor, name: str, path: Path) -> SourceTensor:
    dtype = _float_dtype(stored.dtype, name, path)

    def read() -> mx.array:
        view = stored.array
        if stored.dtype == "bfloat16":
            return mx.array(view).view(mx.bfloat16)
        with np.errstate(over="ignore"):  # infinity is found and said later
            return mx.array(
                view.astype(np.float32) if stored.dtype == "float64" else view
            )

    return SourceTensor(stored.shape, dtype, read)


def _reader(file: Path, name: str) -> Callable[[], mx.array]:
    def read() -> mx.array:
        loaded = mx.load(str(file))  # lazy: the header alone is read here
        assert isinstance(loaded, dict)
        return loaded[name]

    return read


def _float_dtype(dtype: str, name: str, path: Path) -> mx.Dtype:
    if dtype not in _FLOATS:
        raise OpenELMError(
            f"{path}: {name} is stored as {dtype}; weights are float32, float16 or "
            "bfloat16."
        )
    return _FLOATS[dtype]


def _hub_name(path: Path) -> str:
    """The folder's name, or the repository's if it lies in the Hub cache."""
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rsplit("--", 1)[-1]
    return path.resolve().name
