"""Read adapters from CoreNet's .pt files and from PEFT's and mlx-lm's folders.

`adapter_tensors` explains the letters of the shapes.
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
from mlx_openelm.message_parts import list_names
from mlx_openelm.storage.adapter_folder import (
    CONFIG,
    WEIGHTS,
    find_weights,
    read_base,
    read_dropout,
    read_scale,
)
from mlx_openelm.storage.model_folder import METADATA_KEY, MOST_NAMED
from mlx_openelm.storage.weight_files import (
    PEFT_ADAPTER,
    PEFT_BIN,
    find_weight_files,
    holds_model,
)
from mlx_openelm.tensor_names import (
    map_to_corenet,
    to_corenet,
    unwrap,
)

PEFT_PREFIX = "base_model.model."
_ALPHA = ("Ignored alpha, as mlx-lm does: scale is the multiplier.",)
BASE_LAYER = ".base_layer.weight"  # suffix of an adapted weight in CoreNet and PEFT


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that can be merged, or written in another format.

    Attributes:
        kind: description of the detected format.
        modules: by CoreNet's path ("layers.0.attn.qkv_proj").
        dropout: of the training; only copied.
        base: the base model that the files name.
        notes: notes for the user.
        metadata: the mlx-openelm entry of adapter_config.json.
        adapts_tied_head: an adapter of the embedding also changes the logits of a tied
            base (mlx-lm), not only the inputs (CoreNet, PEFT).
        weights: of a full fine-tune, by CoreNet name; they replace the base's, and
            `modules` is empty.
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
        """DoRA if any module is; CoreNet's embedding adapter is always LoRA."""
        if self.weights:
            return "full"
        dora = any(module.method == "dora" for module in self.modules.values())
        return "dora" if dora else "lora"


# Merging and checks --------------------------------------------------------------


def merge(weight: mx.array, module: AdapterModule) -> mx.array:
    """Return the base's weight with the adapter merged, float32 of the same shape."""
    parts = module.read()
    update = module.scale * (parts["a"] @ parts["b"])  # (I, O) or (V, D)
    merged = weight.astype(mx.float32) + (update if module.is_embedding else update.T)
    if "m" in parts:
        lengths = mx.linalg.norm(merged, axis=1)  # (O,)
        merged = merged * (parts["m"] / lengths)[:, None]
    return merged


def check_fits(adapter: Adapter, config: OpenELMConfig) -> None:
    """Check that the adapter fits a base of this config.

    Raises:
        OpenELMError: it adapts modules that the base lacks or has in another shape; all
            are named.
    """
    shapes = config.tensor_shapes()
    adapted = {name: module.shape for name, module in adapter.modules.items()}
    full = {n.removesuffix(".weight"): w.shape for n, w in adapter.weights.items()}
    problems = [
        f"{name} adapts shape {list(shape)}, the base has "
        + (str(list(expected)) if expected else "no such weight")
        for name, shape in {**adapted, **full}.items()
        if (expected := shapes.get(f"{name}.weight")) != shape
    ]
    if problems:
        base = f"; use its own base, {adapter.base!a}" if adapter.base else ""
        listed = list_names(problems, most=MOST_NAMED, quoted=False, separator="; ")
        raise OpenELMError(
            f"The adapter {adapter.name} does not fit this {config.size_name} base: "
            f"{listed}{base}."
        )


def without_table(modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """Return the modules without the embedding, which DoRA adapts by LoRA."""
    return {name: module for name, module in modules.items() if name != TABLE}


def with_rows(adapter: Adapter, rows: int) -> Adapter:
    """Fit an adapter of the embedding to `rows`: cut it, or pad it with zeros."""
    module = adapter.modules.get(TABLE)
    if module is None or module.shape[0] == rows:
        return adapter
    old_rows, width = module.shape

    def read() -> dict[str, mx.array]:
        parts = module.read()
        padding = [(0, max(0, rows - old_rows)), (0, 0)]
        return parts | {"a": mx.pad(parts["a"][:rows], padding)}

    fitted = replace(module, shape=(rows, width), read=read)
    return replace(adapter, modules={**adapter.modules, TABLE: fitted})


# CoreNet -------------------------------------------------------------------------


def split_checkpoint(
    stored: Mapping[str, PtTensor], path: Path
) -> tuple[dict[str, PtTensor], Adapter | None]:
    """Separate a CoreNet checkpoint into its base and, if it has one, its adapter.

    Args:
        stored: by the names in the file, without `module.`: an adapted weight is
            `X.base_layer.weight`, its factors are `X.lora_A.NAME.weight` and so on.

    Returns:
        The base under plain names (`X.weight`), in the file's order, and the adapter.

    Raises:
        OpenELMError: parts are missing, unknown or have wrong shapes; all are named.
    """
    base: dict[str, PtTensor] = {}
    parts = AdapterParts()
    adapters: dict[str | None, None] = {}
    wrapped: dict[str, tuple[int, ...]] = {}
    for name, tensor in stored.items():
        if part_name := parse_torch_name(name):
            parts.add(part_name, read_torch(tensor, name, path))
            adapters[part_name.adapter] = None
            continue
        plain = name
        if name.endswith(BASE_LAYER):
            plain = to_corenet(f"{name.removesuffix(BASE_LAYER)}.weight")
            wrapped[plain.removesuffix(".weight")] = tensor.shape
        elif ".lora_" in name or ".base_layer." in name:
            parts.problems.append(f"{name!a} is unknown")
        if plain in base:
            parts.problems.append(f"{plain} is stored both plain and as a base_layer")
        base[plain] = tensor
    if not (parts.by_module or wrapped or parts.problems):
        return base, None
    if len(adapters) > 1:
        parts.problems.append(
            f"there is more than one adapter: {', '.join(map(str, adapters))}"
        )
    for name in wrapped:
        if name not in parts.by_module:
            parts.problems.append(f"{name} has a base_layer, but no adapter")
    for name in parts.by_module:
        if name not in wrapped:
            parts.problems.append(f"{name} has an adapter, but no base_layer")
    modules = parts.assemble(scale=1.0)
    dora_paths = {_in_block(n) for n, part in modules.items() if part.method == "dora"}
    for name, module in modules.items():
        if module.method == "lora" and _in_block(name) in dora_paths:
            parts.problems.append(f"{name} lacks the magnitude that other layers have")
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
            "A CoreNet checkpoint does not store its adapter's alpha: assumed to equal "
            "the rank (scale 1.0), as in all of CoreNet's configs.",
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
    """Open an adapter folder of PEFT or mlx-lm.

    Raises:
        OpenELMError: it is not an adapter, is damaged, or uses unsupported features;
            all problems of one kind are named.
    """
    if not (path / CONFIG).is_file():
        if holds_model(path):
            raise OpenELMError(
                f"{path} is not an adapter folder: it has no {CONFIG}; it is a model, "
                "pass it as `model`."
            )
        raise OpenELMError(
            f"{path} is not an adapter folder: it has no {CONFIG}. Expected one, and "
            f"{WEIGHTS} (mlx-lm) or {PEFT_ADAPTER.single} (PEFT)."
        )
    raw = read_mapping(path / CONFIG)
    return _open_peft(path, raw) if "peft_type" in raw else _open_mlx(path, raw)


def open_full(path: Path) -> Adapter | None:
    """Open a full fine-tune of mlx-lm or mlx-openelm; None for other folders.

    Raises:
        OpenELMError: its file is missing or damaged.
    """
    raw = read_mapping(path / CONFIG) if (path / CONFIG).is_file() else {}
    if raw.get("fine_tune_type") != "full" or "peft_type" in raw:
        return None
    stored, notes = read_parts(find_weights(path))
    if not stored:
        raise OpenELMError(
            f"{path / WEIGHTS} holds no weights; copy it again from the training "
            "machine."
        )
    metadata = raw.get(METADATA_KEY)
    return Adapter(
        name=path.resolve().name,
        kind="full fine-tune",
        modules={},
        dropout=0.0,
        base=read_base(raw, path),
        files=(path / CONFIG, path / WEIGHTS),
        notes=notes,
        metadata=metadata if isinstance(metadata, dict) else {},
        weights={ours: stored[name] for ours, name in map_to_corenet(stored).items()},
    )


def _open_mlx(path: Path, raw: dict[str, Any]) -> Adapter:
    """Open a folder of mlx-lm. The tensors define which modules are adapted.

    So the keys `num_layers` and (in old configs) `lora_layers` are not needed.
    """
    method = raw.get("fine_tune_type", "lora")
    if method == "full":
        raise OpenELMError(
            f"{path} is a full fine-tune (whole weights), not an adapter; run "
            "`mlx-openelm fuse` first and convert its result."
        )
    if method not in ("lora", "dora"):
        raise OpenELMError(
            f"{path / CONFIG}: fine_tune_type is {method!a}; expected lora or dora."
        )
    scale = read_scale(raw, path)
    parts = AdapterParts()
    stored_parts, notes = read_parts(find_weights(path))
    adapts_tied_head = False
    for name, stored in stored_parts.items():
        if part_name := parse_mlx_name(unwrap(name)):
            parts.add(part_name, stored)
            adapts_tied_head |= part_name.with_tied_head
        else:
            parts.problems.append(f"{name!a} is unknown")
    modules = parts.assemble(scale)
    linears = modules if adapts_tied_head else without_table(modules)
    _compare_methods(parts, linears, method)
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
        notes=(*(_ALPHA if "alpha" in parameters else ()), *notes),
        metadata=metadata if isinstance(metadata, dict) else {},
        adapts_tied_head=adapts_tied_head,
    )


def _open_peft(path: Path, raw: dict[str, Any]) -> Adapter:
    config = read_peft_config(raw, path / CONFIG)
    found = find_weight_files(path, (PEFT_ADAPTER, PEFT_BIN))
    (weights,) = found.files
    parts = AdapterParts()
    stored_parts, notes = read_parts(weights)
    parsed = {
        name: parse_torch_name(unwrap(name).removeprefix(PEFT_PREFIX))
        for name in stored_parts
    }
    adapters = {part_name.adapter for part_name in parsed.values() if part_name}
    for name, part_name in parsed.items():
        if part_name and (len(adapters) == 1 or not part_name.adapter):
            parts.add(part_name, stored_parts[name])
        else:
            parts.problems.append(f"{name!a} is unknown")
    modules = parts.assemble(scale=1.0)
    _compare_methods(parts, modules, config.method)
    for name, module in modules.items():
        target, rank = parts.targets[name], module.rank
        if (configured := config.ranks.of(target)) != rank:
            parts.problems.append(f"{name} has rank {rank}, the config {configured:g}")
        modules[name] = replace(module, scale=config.scale_of(target, rank))
    parts.refuse_problems(weights)
    return Adapter(
        name=path.resolve().name,
        kind="PEFT adapter",
        modules=modules,
        dropout=config.dropout,
        base=config.base,
        files=(path / CONFIG, weights),
        notes=(*found.notes, *notes),
    )


def _compare_methods(
    parts: AdapterParts, modules: Mapping[str, AdapterModule], method: str
) -> None:
    """Add a problem for every module whose method differs from the config's."""
    has = "no magnitude" if method == "dora" else "a magnitude"
    for name, module in modules.items():
        if module.method != method:
            parts.problems.append(f"{name} has {has}, but the config is for {method}")
