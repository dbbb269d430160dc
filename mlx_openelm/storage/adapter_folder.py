"""Adapter folders in mlx-lm's format: reading, attaching to a model, writing."""

import errno
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.model.lora import (
    A_NAMES,
    B_NAMES,
    DoRALinear,
    InputLoRAEmbedding,
    LoRAEmbedding,
    LoRALinear,
)
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.paths import user_path
from mlx_openelm.storage.base_check import BaseWeight, base_weights, check_base
from mlx_openelm.storage.hub import HUB_ID, find_model, refuse_address
from mlx_openelm.storage.model_folder import (
    METADATA_KEY,
    ConfiguredFolder,
    check_shapes,
)
from mlx_openelm.storage.shards import write_json
from mlx_openelm.storage.similar_names import suggest_similar
from mlx_openelm.storage.weight_files import holds_model
from mlx_openelm.storage.weight_reader import check_stored, read_headers
from mlx_openelm.tensor_names import map_to_corenet, split_buffers, to_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
BEST = "best"  # in a training run's folder: the adapter with the lowest loss
FACTORS = tuple(zip(A_NAMES, B_NAMES, strict=True))  # names of A and B
RECIPE = "recipe.yaml"  # the first file that a training run writes

Method = Literal["lora", "dora", "full"]


@dataclass(frozen=True, slots=True)
class AdapterFolder(ConfiguredFolder):
    """An adapter on disk; its config was read, its tensors were not."""

    method: Method

    @property
    def base(self) -> str | None:
        """The base that it was trained on: demo, a folder, or a Hub id."""
        return read_base(self.raw, self.path)

    def find_base(self, *, offline: bool = False) -> Path:
        """Return the folder of its base; a Hub id is downloaded if necessary.

        Raises:
            OpenELMError: the adapter does not name its base, or it is unavailable.
        """
        if self.base is None:
            raise OpenELMError(f"{self.path} names no base; pass `model` BASE.")
        try:
            return find_model(self.base, offline=offline)
        except OpenELMError as error:
            raise OpenELMError(
                f"The base of {self.path} is not available: "
                f"{str(error).rstrip('.')}; pass `model` BASE."
            ) from error

    def check_base(self, weights: Mapping[str, BaseWeight]) -> tuple[str, ...]:
        """Compare a base with the stored fingerprint; see `base_check.check_base`."""
        stored = read_base_fingerprint(self.metadata)
        return check_base(stored, weights, self.path, self.base) if stored else ()


def open_adapter_folder(path: Path) -> AdapterFolder:
    """Open an adapter folder of mlx-lm or mlx-openelm.

    Raises:
        OpenELMError: it is not an adapter, is PEFT's, or has no weights yet.
    """
    _refuse_non_folder(path)
    if (path / RECIPE).is_file():
        find_weights(path)  # its error is more specific than that of a missing config
    if not (path / CONFIG).is_file():
        instead = (
            "it is a model, pass it as `model`"
            if holds_model(path)
            else f"an adapter folder has {CONFIG} and {WEIGHTS}"
        )
        raise OpenELMError(f"{path} holds no {CONFIG}; {instead}.")
    raw = read_mapping(path / CONFIG)
    if "peft_type" in raw:
        folder = shlex.quote(str(path))
        command = f"convert {folder}` converts it to a format that can be used here"
        if holds_model(path):  # convert would write the model
            fused = shlex.quote(f"{path.resolve().name}-fused")
            command = (
                f"fuse --adapter-path {folder} --save-path {fused}` merges it into its "
                "base"
            )
        raise OpenELMError(f"{path} is a PEFT adapter; `mlx-openelm {command}.")
    find_weights(path)
    method = raw.get("fine_tune_type", "lora")
    if method not in ("lora", "dora", "full"):
        raise OpenELMError(
            f"{path / CONFIG} has fine_tune_type {method!a}; expected lora, dora or "
            "full."
        )
    return AdapterFolder(path, raw, method)


def find_adapter(
    name: str, *, offline: bool = False, parameter: str = "adapter_path"
) -> Path:
    """Return the local path of an adapter folder; a Hub id is downloaded if necessary.

    Args:
        parameter: what the caller calls `name`, for errors.

    Raises:
        OpenELMError: there is no such folder, or the download failed.
    """
    path = user_path(name)
    if HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return find_model(name, offline=offline)
    _refuse_non_folder(path, parameter)
    return path


def _refuse_non_folder(path: Path, parameter: str = "adapter_path") -> None:
    if path.is_dir():
        return
    refuse_address(str(path))
    if path.is_file():
        raise OpenELMError(
            f"{path} is a file, not an adapter folder; pass the folder, {path.parent}."
        )
    similar = suggest_similar(str(path), (), CONFIG)
    raise OpenELMError(
        f"There is no adapter folder {path}; check `{parameter}`.{similar}"
    )


def find_weights(path: Path) -> Path:
    """Return the weight file of an adapter folder or a training run's folder.

    Raises:
        OpenELMError: there are no weights, or none yet.
    """
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    reason, instead = "the copy is incomplete", "copy it again"
    if (path / RECIPE).is_file():
        reason = f"its training has not saved yet, or {reason}"
        instead = "wait until it has"
    if (path / BEST / WEIGHTS).is_file():
        instead = f"use {path / BEST}"
    raise OpenELMError(f"{path} holds no {WEIGHTS}: {reason}; {instead}.")


def attach(model: OpenELM, path: Path) -> tuple[str, ...]:
    """Attach a LoRA, DoRA or full adapter to a model, in place.

    The arrays are computed here, so that the model can run in another thread.

    Returns:
        Notes for the user, for example that the base is another version.

    Raises:
        OpenELMError: the folder is not an adapter, or is one for another model (the
            tensors that do not match are named).
    """
    adapter = open_adapter_folder(path)
    read, left_out = split_buffers(read_headers([path / WEIGHTS]))
    mapped = map_to_corenet(read).items()
    headers = {to_folder(ours): read[theirs] for ours, theirs in mapped}
    check_stored(headers)
    arrays = {name: tensor.read() for name, tensor in headers.items()}
    if not headers:
        raise OpenELMError(f"{path / WEIGHTS} is empty; use another adapter.")
    stored = {name: tensor.shape for name, tensor in headers.items()}
    if adapter.method == "full":
        parameters = dict(tree_flatten(model.parameters()))
        shapes = {name: tuple(array.shape) for name, array in parameters.items()}
        expected = {name: shapes[name] for name in stored if name in shapes}
        check_shapes(expected, stored, where=str(path / WEIGHTS))
        notes = adapter.check_base(base_weights(model))
        cast = {n: array.astype(parameters[n].dtype) for n, array in arrays.items()}
        model.load_weights(list(cast.items()), strict=False)
        mx.eval(model.parameters())
        return (*left_out, *notes)
    scale = read_scale(adapter.raw, path)
    modules = dict(model.named_modules())
    by_module: dict[str, dict[str, mx.array]] = {}
    for name, array in arrays.items():
        module_path, _, leaf = name.rpartition(".")
        by_module.setdefault(module_path, {})[leaf] = array
    wrapped: list[tuple[str, nn.Module]] = []
    expected_shapes: dict[str, tuple[int, ...]] = {}
    for module_path, parts in by_module.items():
        module = modules.get(module_path)
        names = next((n for n in FACTORS if parts.keys() >= {*n}), None)
        if module is None or names is None:
            continue  # reported below, as unexpected
        rank, dora = parts[names[0]].shape[-1], adapter.method == "dora"
        shapes = _adapter_shapes(module, names, rank, dora)
        expected_shapes |= {f"{module_path}.{n}": s for n, s in shapes.items()}
        wrapped.append((module_path, wrap(module, parts, scale)))
    check_shapes(expected_shapes, stored, where=str(path / WEIGHTS))
    notes = adapter.check_base(base_weights(model))
    model.update_modules(tree_unflatten(wrapped))
    mx.eval(model.parameters())
    for _, module in wrapped:
        if isinstance(module, DoRALinear):
            module.fix_lengths()
    model.eval()
    return (*left_out, *notes)


def read_base(raw: Mapping[str, Any], path: Path) -> str | None:
    """Return the base that the adapter_config.json in `path` names, or None.

    A relative path starts in the working directory, as in mlx-lm, or in the adapter's
    folder if it exists only there.
    """
    name = raw.get("model")
    if not isinstance(name, str) or not name:
        return None
    inside = os.path.join(path, name)  # not Path: a Hub id must stay as it was
    return inside if os.path.isdir(inside) and not os.path.isdir(name) else name


def read_base_fingerprint(metadata: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the base in an adapter's metadata, or None."""
    base = metadata.get("base")
    fingerprint = base.get("sketch") if isinstance(base, dict) else None
    return fingerprint if isinstance(fingerprint, str) else None


def read_scale(config: Mapping[str, Any], path: Path) -> float:
    """Return the multiplier of A B in the adapter_config.json in `path`."""
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not is_number(scale):
        raise OpenELMError(
            f"{path / CONFIG} has no lora_parameters.scale; it was not written by "
            "mlx-lm 0.32 or mlx-openelm."
        )
    return float(scale)


def read_dropout(config: Mapping[str, Any], key: str, path: Path) -> float:
    """Return the dropout rate in the config at `path`; 0 if it has none."""
    value = config.get(key, 0.0)
    if not is_number(value) or not 0 <= value < 1:
        raise OpenELMError(
            f"{path} has {key} {value!a:.80}; expected a number from 0 to below 1."
        )
    return float(value)


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a config's value is a number below 1e9 in size."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e9
    )


def _adapter_shapes(
    module: nn.Module, names: tuple[str, str], rank: int, dora: bool
) -> dict[str, tuple[int, ...]]:
    """Return the tensor shapes of an adapter of `rank` for this module.

    Args:
        names: those of the factors A and B.
    """
    a, b = names
    rows, width = module.weight.shape
    if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        width = width * 32 // module.bits
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        return {a: (rows, rank), b: (rank, width)}
    shapes: dict[str, tuple[int, ...]] = {
        "lora_a": (width, rank),
        "lora_b": (rank, rows),
    }
    return shapes | ({"m": (rows,)} if dora else {})


def wrap(
    module: nn.Module, parts: Mapping[str, mx.array], scale: float
) -> LoRALinear | LoRAEmbedding | InputLoRAEmbedding:
    """Return a linear or embedding with its adapter.

    Args:
        parts: lora_a, lora_b and, in DoRA, m; of an embedding that is adapted without
            its tied head: lora_embedding_a, lora_embedding_b.
    """
    if "lora_embedding_a" in parts:
        a, b = parts["lora_embedding_a"], parts["lora_embedding_b"]
        return InputLoRAEmbedding(module, a, b, scale)
    lora_a, lora_b = parts["lora_a"], parts["lora_b"]
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        return LoRAEmbedding(module, lora_a, lora_b, scale)
    if "m" in parts:
        return DoRALinear(module, lora_a, lora_b, scale, parts["m"])
    return LoRALinear(module, lora_a, lora_b, scale)


# Writing -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The contents of adapter_config.json: mlx-lm's keys and our metadata.

    A full fine-tune has no `keys`, `rank` and `scale`.

    Attributes:
        keys: paths of the adapted modules, in the model or in a block; the latter apply
            to the last `num_layers` blocks.
        scale: the multiplier of A B.
        base: the model that it was trained on, a folder or a Hub id.
        metadata: our entry: "template", "base" {"name", "sketch"}, source, hashes.
    """

    method: Method
    num_layers: int
    keys: tuple[str, ...] = ()
    rank: int = 0
    scale: float = 0.0
    dropout: float = 0.0
    base: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def write_adapter(
    folder: Path, config: AdapterConfig, tensors: Mapping[str, mx.array]
) -> None:
    """Write an adapter folder that mlx-lm reads, into an empty folder.

    Args:
        tensors: float32, by mlx-lm's names: `PATH.lora_a`, `PATH.lora_b` and, for DoRA,
            `PATH.m` of every module in `config.keys`, as in `wrap`; for a full
            fine-tune the weights.

    Raises:
        OSError: a file cannot be written.
    """
    write_config(folder, config)
    save_tensors(folder / WEIGHTS, tensors, format="mlx")


def write_config(folder: Path, config: AdapterConfig) -> None:
    """Write only the config of an adapter folder; errors as `write_adapter`."""
    entries: dict[str, Any] = {
        "fine_tune_type": config.method,
        "num_layers": config.num_layers,
        METADATA_KEY: dict(config.metadata),
    }
    if config.method != "full":
        entries["lora_parameters"] = {
            "keys": list(config.keys),
            "rank": config.rank,
            "scale": config.scale,
            "dropout": config.dropout,
        }
    if config.base:
        entries["model"] = config.base
    write_json(folder / CONFIG, entries)


def save_tensors(
    path: Path,
    tensors: Mapping[str, mx.array],
    *,
    format: Literal["mlx", "pt"],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file; its readers require a `format` in the metadata.

    Raises:
        OSError: the file cannot be written; ENOSPC if the disk is full.
    """
    try:
        entries = {"format": format, **(metadata or {})}
        mx.save_safetensors(str(path), dict(tensors), metadata=entries)
    except RuntimeError as error:
        num_bytes = sum(array.nbytes for array in tensors.values())
        full = shutil.disk_usage(path.parent).free < num_bytes
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, f"{path.name}: {str(error).rstrip('.')}") from error
