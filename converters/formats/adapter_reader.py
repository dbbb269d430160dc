"""Adapters in other people's files: CoreNet's .pt, PEFT's and mlx-lm's folders.

The letters of the shapes are those of `adapter_tensors`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from converters.formats.adapter_tensors import (
    TABLE,
    AdapterModule,
    AdapterParts,
    Method,
    StoredPart,
    parse_mlx_name,
    parse_torch_name,
    read_parts,
    read_torch,
)
from converters.formats.peft_config import read_peft_config
from converters.formats.pickle_machine import PtTensor
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.storage.adapter_folder import (
    CONFIG,
    WEIGHTS,
    find_weights,
    read_base,
    read_dropout,
    read_scale,
)
from mlx_openelm.storage.model_folder import METADATA_KEY
from mlx_openelm.tensor_names import map_to_corenet, to_corenet

PEFT_WEIGHTS, PEFT_BIN = "adapter_model.safetensors", "adapter_model.bin"
PEFT_PREFIX = "base_model.model."
BASE_LAYER = ".base_layer.weight"  # of a weight that CoreNet or PEFT has wrapped


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that can be merged, or written in another format.

    Attributes:
        kind: what it was recognised as, in words.
        modules: by CoreNet's path ("layers.0.attn.qkv_proj").
        dropout: of the training; nothing here depends on it.
        base: what the files say about the base model.
        notes: what a person should know.
        metadata: our own entry of adapter_config.json.
        adapts_tied_head: an adapter of the embedding acts on the logits of a tied base
            as well. mlx-lm's does; CoreNet's and PEFT's act on inputs alone.
        weights: a full fine-tune's, by CoreNet name; they take the place of the base's,
            and there are no modules then.
    """

    name: str
    kind: str
    modules: Mapping[str, AdapterModule]
    dropout: float
    base: str | None
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    adapts_tied_head: bool = False
    weights: Mapping[str, StoredPart] = field(default_factory=dict)

    @property
    def method(self) -> Method | Literal["full"]:
        """DoRA where any module is; CoreNet's embedding beside it is always LoRA."""
        if self.weights:
            return "full"
        dora = any(module.method == "dora" for module in self.modules.values())
        return "dora" if dora else "lora"


# Use -----------------------------------------------------------------------------


def merge(weight: mx.array, module: AdapterModule) -> mx.array:
    """Return the base's weight with its adapter in it, float32 of the same shape."""
    parts = module.read()
    update = module.scale * (parts["a"] @ parts["b"])  # (I, O) or (V, D)
    merged = weight.astype(mx.float32) + (update if module.is_embedding else update.T)
    if "m" in parts:
        lengths = mx.linalg.norm(merged, axis=1)  # (O,)
        merged = merged * (parts["m"] / lengths)[:, None]
    return merged


def check_fits(adapter: Adapter, config: OpenELMConfig) -> None:
    """Compare the adapter with the base that it is to act on.

    Raises:
        OpenELMError: it adapts what the base has not, or has in another shape; all of
            it is named.
    """
    shapes = config.tensor_shapes()
    adapted = {name: module.shape for name, module in adapter.modules.items()}
    whole = {n.removesuffix(".weight"): w.shape for n, w in adapter.weights.items()}
    problems = [
        f"{name} adapts {list(found)}, the base has "
        + (str(list(shape)) if shape else "no such weight")
        for name, found in {**adapted, **whole}.items()
        if (shape := shapes.get(f"{name}.weight")) != found
    ]
    if problems:
        base = f"; give its own base, {adapter.base!a}" if adapter.base else ""
        raise OpenELMError(
            f"The adapter {adapter.name} was made for another base than this "
            f"{config.size_name}: {'; '.join(problems)}{base}."
        )


def without_embedding(adapter: Adapter) -> Adapter:
    """Return the adapter of the linears alone."""
    kept = {name: part for name, part in adapter.modules.items() if name != TABLE}
    return replace(adapter, modules=kept)


def with_rows(adapter: Adapter, rows: int) -> Adapter:
    """Fit an adapter of the embedding to a table of `rows`: cut, or padded by zeros."""
    module = adapter.modules.get(TABLE)
    if module is None or module.shape[0] == rows:
        return adapter
    found, width = module.shape

    def read() -> dict[str, mx.array]:
        parts = module.read()
        padding = [(0, max(0, rows - found)), (0, 0)]
        return parts | {"a": mx.pad(parts["a"][:rows], padding)}

    fitted = replace(module, shape=(rows, width), read=read)
    return replace(adapter, modules={**adapter.modules, TABLE: fitted})


# CoreNet -------------------------------------------------------------------------


def split_checkpoint(
    stored: Mapping[str, PtTensor], path: Path
) -> tuple[dict[str, PtTensor], Adapter | None]:
    """Separate a CoreNet checkpoint's base from the adapter that it may carry.

    Args:
        stored: by the names in the file, without `module.`: an adapted weight is
            `X.base_layer.weight`, its factors are `X.lora_A.NAME.weight` and so on.

    Returns:
        The base under plain names (`X.weight`), in the file's order, and the adapter.

    Raises:
        OpenELMError: parts are missing, strange or of other shapes; all are named.
    """
    base: dict[str, PtTensor] = {}
    parts = AdapterParts()
    adapters: dict[str | None, None] = {}
    wrapped: dict[str, tuple[int, ...]] = {}
    for name, tensor in stored.items():
        if found := parse_torch_name(name):
            parts.add(found, read_torch(tensor, name, path))
            adapters[found.adapter] = None
            continue
        plain = name
        if name.endswith(BASE_LAYER):
            plain = to_corenet(f"{name.removesuffix(BASE_LAYER)}.weight")
            wrapped[plain.removesuffix(".weight")] = tensor.shape
        elif ".lora_" in name or ".base_layer." in name:
            parts.problems.append(f"{name!a} is unknown")
        if plain in base:
            parts.problems.append(f"{plain} is there plain and as a base_layer")
        base[plain] = tensor
    if not (parts.by_module or wrapped or parts.problems):
        return base, None
    if len(adapters) > 1:
        parts.problems.append(
            f"there are several adapters: {', '.join(map(str, adapters))}"
        )
    for name in wrapped:
        if name not in parts.by_module:
            parts.problems.append(f"{name} has a base_layer, but no adapter")
    for name in parts.by_module:
        if name not in wrapped:
            parts.problems.append(f"{name} has an adapter, but no base_layer")
    modules = parts.assemble(scale=1.0)
    stretched = {_in_block(n) for n, part in modules.items() if part.method == "dora"}
    for name, module in modules.items():
        if module.method == "lora" and _in_block(name) in stretched:
            parts.problems.append(f"{name} lacks a magnitude, which other layers have")
        if wrapped.get(name, module.shape) != module.shape:
            parts.problems.append(
                f"{name} adapts {list(module.shape)}, its base_layer is "
                f"{list(wrapped[name])}"
            )
    parts.refuse_problems(path)
    adapter = Adapter(
        name=path.stem,
        kind="CoreNet LoRA checkpoint",
        modules=modules,
        dropout=0.1,
        base=None,
        files=(path,),
        notes=(
            "A CoreNet checkpoint does not tell its adapter's alpha: taken as the rank "
            "(scale 1.0), as in all of CoreNet's configs.",
        ),
    )
    if adapter.method == "dora":
        adapter = replace(adapter, kind="CoreNet DoRA checkpoint")
    return base, adapter


def _in_block(module: str) -> str:
    """Return a module's path without its layer: "attn.qkv_proj"."""
    return re.sub(r"^layers\.\d+\.", "", module)


# Folders -------------------------------------------------------------------------


def open_adapter(path: Path) -> Adapter:
    """Open an adapter folder, PEFT's or mlx-lm's.

    Raises:
        OpenELMError: it is none, is damaged, or says what cannot be carried over; all
            problems of one kind are named.
    """
    if not (path / CONFIG).is_file():
        raise OpenELMError(
            f"{path} holds no {CONFIG}; an adapter folder has one, beside {WEIGHTS} "
            f"(mlx-lm's) or {PEFT_WEIGHTS} (PEFT's)."
        )
    raw = read_mapping(path / CONFIG)
    return _open_peft(path, raw) if "peft_type" in raw else _open_mlx(path, raw)


def open_full(path: Path) -> Adapter | None:
    """Open a full fine-tune of mlx-lm's or ours; None: the folder is none.

    Raises:
        OpenELMError: its file is missing or damaged.
    """
    raw = read_mapping(path / CONFIG) if (path / CONFIG).is_file() else {}
    if raw.get("fine_tune_type") != "full" or "peft_type" in raw:
        return None
    stored = read_parts(find_weights(path))
    if not stored:
        raise OpenELMError(
            f"{path / WEIGHTS} holds no weights; copy it again from where it was "
            "trained."
        )
    metadata = raw.get(METADATA_KEY)
    return Adapter(
        name=path.resolve().name,
        kind="full fine-tune",
        modules={},
        dropout=0.0,
        base=read_base(raw, path),
        files=(path / CONFIG, path / WEIGHTS),
        metadata=metadata if isinstance(metadata, dict) else {},
        weights={ours: stored[name] for ours, name in map_to_corenet(stored).items()},
    )


def _open_mlx(path: Path, raw: dict[str, Any]) -> Adapter:
    """Open mlx-lm's folder; the tensors say what is adapted.

    So it does not matter whether the config counts layers in `num_layers` or, as old
    ones do, in `lora_layers`.
    """
    method = raw.get("fine_tune_type", "lora")
    if method == "full":
        raise OpenELMError(
            f"{path} is a full fine-tune: whole weights, which are no adapter; put it "
            "into its base with `mlx-openelm fuse` and convert that."
        )
    if method not in ("lora", "dora"):
        raise OpenELMError(
            f"{path / CONFIG} says fine_tune_type {method!a}; expected lora or dora."
        )
    scale = read_scale(raw, path)
    parts = AdapterParts()
    for name, stored in read_parts(find_weights(path)).items():
        if found := parse_mlx_name(name):
            parts.add(found, stored)
        else:
            parts.problems.append(f"{name!a} is unknown")
    modules = parts.assemble(scale)
    _compare_methods(parts, modules, method)
    parts.refuse_problems(path / WEIGHTS)
    parameters = raw["lora_parameters"]
    metadata = raw.get(METADATA_KEY)
    return Adapter(
        name=path.resolve().name,
        kind="mlx-lm adapter",
        modules=modules,
        dropout=read_dropout(parameters, "dropout", path / CONFIG),
        base=read_base(raw, path),
        files=(path / CONFIG, path / WEIGHTS),
        notes=("Its alpha is left out, as mlx-lm does: scale is the multiplier.",)
        if "alpha" in parameters
        else (),
        metadata=metadata if isinstance(metadata, dict) else {},
        adapts_tied_head=True,
    )


def _open_peft(path: Path, raw: dict[str, Any]) -> Adapter:
    config = read_peft_config(raw, path / CONFIG)
    weights = path / PEFT_WEIGHTS
    if not weights.is_file() and (path / PEFT_BIN).is_file():
        weights = path / PEFT_BIN
    parts = AdapterParts()
    for name, stored in read_parts(_existing(weights)).items():
        found = parse_torch_name(name.removeprefix(PEFT_PREFIX))
        if found and not found.adapter:
            parts.add(found, stored)
        else:
            parts.problems.append(f"{name!a} is unknown")
    modules = parts.assemble(scale=1.0)
    _compare_methods(parts, modules, config.method)
    for name, module in modules.items():
        target, rank = parts.targets[name], module.rank
        if (said := config.ranks.of(target)) != rank:
            parts.problems.append(f"{name} has rank {rank}, the config says {said:g}")
        modules[name] = replace(module, scale=config.scale_of(target, rank))
    parts.refuse_problems(weights)
    return Adapter(
        name=path.resolve().name,
        kind="PEFT adapter",
        modules=modules,
        dropout=config.dropout,
        base=config.base,
        files=(path / CONFIG, weights),
    )


def _compare_methods(
    parts: AdapterParts, modules: Mapping[str, AdapterModule], method: str
) -> None:
    """Note every module that is not what the config says of all of them."""
    has = "no magnitude" if method == "dora" else "a magnitude"
    for name, module in modules.items():
        if module.method != method:
            parts.problems.append(f"{name} has {has}, but the config says {method}")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise OpenELMError(
            f"{path.parent} holds no {path.name}, which its {CONFIG} describes; copy "
            "or download the folder again."
        )
    return path
