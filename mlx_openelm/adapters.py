"""An adapter folder, as mlx-lm writes it: read and attached to a model, and written."""

import errno
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_openelm.checkpoint import METADATA_KEY, check_shapes, read_headers
from mlx_openelm.config import read_mapping
from mlx_openelm.errors import OpenELMError
from mlx_openelm.lora_layers import DoRALinear, LoRAEmbedding, LoRALinear
from mlx_openelm.model import OpenELM
from mlx_openelm.shards import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


def attach(model: OpenELM, path: Path) -> None:
    """Put a LoRA, DoRA or full adapter onto a model, in place.

    Raises:
        OpenELMError: the folder is no adapter, or was made for another model (the
            tensors that do not fit are named).
    """
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise OpenELMError(
                f"{path} holds no {name}; an adapter folder has {CONFIG} and {WEIGHTS}."
            )
    config = read_mapping(path / CONFIG)
    kind = config.get("fine_tune_type", "lora")
    headers = read_headers([path / WEIGHTS])
    arrays = mx.load(str(path / WEIGHTS))
    assert isinstance(arrays, dict)
    if kind == "full":
        parameters = dict(tree_flatten(model.parameters()))
        shapes = {name: tuple(array.shape) for name, array in parameters.items()}
        found = {name: tensor.shape for name, tensor in headers.items()}
        expected = {name: shapes[name] for name in found if name in shapes}
        check_shapes(expected, found, where=str(path / WEIGHTS))
        model.load_weights(list(arrays.items()), strict=False)
        return
    if kind not in ("lora", "dora"):
        raise OpenELMError(
            f"{path / CONFIG} says fine_tune_type {kind!r}; expected lora, dora or "
            "full."
        )
    scale = read_scale(config, path)
    modules = dict(model.named_modules())
    by_module: dict[str, dict[str, mx.array]] = {}
    for name, array in arrays.items():
        module_path, _, leaf = name.rpartition(".")
        by_module.setdefault(module_path, {})[leaf] = array
    wrapped: list[tuple[str, nn.Module]] = []
    expected_shapes: dict[str, tuple[int, ...]] = {}
    for module_path, parts in by_module.items():
        module = modules.get(module_path)
        if module is None or "lora_a" not in parts or "lora_b" not in parts:
            continue  # reported below, as unexpected
        rank = parts["lora_a"].shape[-1]
        expected_shapes |= _adapter_shapes(module, module_path, rank, kind == "dora")
        wrapped.append((module_path, _wrap(module, parts, scale)))
    found = {name: tensor.shape for name, tensor in headers.items()}
    check_shapes(expected_shapes, found, where=str(path / WEIGHTS))
    model.update_modules(tree_unflatten(wrapped))
    model.eval()


def read_scale(config: Mapping[str, Any], path: Path) -> float:
    """Return the multiplier of A B that the adapter_config.json in `path` says."""
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not is_number(scale):
        raise OpenELMError(
            f"{path / CONFIG} has no lora_parameters.scale; it was not written by "
            "mlx-lm 0.32 or mlx-openelm."
        )
    return float(scale)


def read_dropout(found: Mapping[str, Any], key: str, path: Path) -> float:
    """Return the dropout that a config at `path` says, 0 where it says none."""
    value = found.get(key, 0.0)
    if not is_number(value) or not 0 <= value < 1:
        raise OpenELMError(
            f"{path} says {key} {value!a:.80}; expected a number from 0 to below 1."
        )
    return float(value)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a config's value is a number that can be computed with."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e9
    )


def _adapter_shapes(
    module: nn.Module, path: str, rank: int, dora: bool
) -> dict[str, tuple[int, ...]]:
    """The shapes that an adapter of `rank` for this module has, by name."""
    rows, width = module.weight.shape
    if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        width = width * 32 // module.bits
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        return {f"{path}.lora_a": (rows, rank), f"{path}.lora_b": (rank, width)}
    shapes: dict[str, tuple[int, ...]] = {
        f"{path}.lora_a": (width, rank),
        f"{path}.lora_b": (rank, rows),
    }
    return shapes | ({f"{path}.m": (rows,)} if dora else {})


def _wrap(module: nn.Module, parts: dict[str, mx.array], scale: float) -> nn.Module:
    lora_a, lora_b = parts["lora_a"], parts["lora_b"]
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        return LoRAEmbedding(module, lora_a, lora_b, scale)
    if "m" in parts:
        return DoRALinear(module, lora_a, lora_b, scale, parts["m"])
    return LoRALinear(module, lora_a, lora_b, scale)


# Writing -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What mlx-lm's loader must know of an adapter, and what we say besides.

    Attributes:
        keys: the adapted modules, by their path in the model or in a block; the latter
            are looked for in the last `num_layers` blocks.
        scale: the multiplier of A B.
        base: the model that it was made for, a folder or a Hub id.
        metadata: our own entry: prompt template, source, hashes.
    """

    method: Literal["lora", "dora"]
    num_layers: int
    keys: tuple[str, ...]
    rank: int
    scale: float
    dropout: float = 0.0
    base: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def write_adapter(
    folder: Path, config: AdapterConfig, tensors: Mapping[str, mx.array]
) -> None:
    """Write an adapter folder that mlx-lm reads, into an empty folder.

    Args:
        tensors: float32, by mlx-lm's names: `PATH.lora_a`, `PATH.lora_b` and, of DoRA,
            `PATH.m` of every module in `config.keys`.

    Raises:
        OSError: the disk refuses.
    """
    write_json(
        folder / CONFIG,
        {
            "fine_tune_type": config.method,
            "num_layers": config.num_layers,
            "lora_parameters": {
                "keys": list(config.keys),
                "rank": config.rank,
                "scale": config.scale,
                "dropout": config.dropout,
            },
            **({"model": config.base} if config.base else {}),
            METADATA_KEY: dict(config.metadata),
        },
    )
    save_tensors(folder / WEIGHTS, tensors, format="mlx")


def save_tensors(
    path: Path, tensors: Mapping[str, mx.array], *, format: Literal["mlx", "pt"]
) -> None:
    """Write a safetensors file; `format` is what its readers ask for.

    Raises:
        OSError: the disk refuses, for want of room (ENOSPC) or otherwise.
    """
    try:
        mx.save_safetensors(str(path), dict(tensors), metadata={"format": format})
    except RuntimeError as error:
        num_bytes = sum(array.nbytes for array in tensors.values())
        full = shutil.disk_usage(path.parent).free < num_bytes
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, f"{path.name}: {str(error).rstrip('.')}") from error
