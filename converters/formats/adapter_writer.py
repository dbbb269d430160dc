"""Write adapters as folders of mlx-lm or PEFT, or into a CoreNet checkpoint."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx

from converters.formats.adapter_reader import (
    BASE_LAYER,
    PEFT_PREFIX,
    Adapter,
    check_fits,
)
from converters.formats.adapter_tensors import TABLE, AdapterModule
from converters.formats.pt_writer import TensorToWrite
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.adapter_folder import (
    CONFIG,
    FACTORS,
    AdapterConfig,
    save_tensors,
    write_adapter,
)
from mlx_openelm.storage.shards import write_json
from mlx_openelm.storage.weight_files import PEFT_ADAPTER
from mlx_openelm.tensor_names import to_corenet, to_module

_Number = TypeVar("_Number", int, float)


def write_mlx_adapter(
    folder: Path,
    adapter: Adapter,
    *,
    config: OpenELMConfig | None,
    base: str | None,
    metadata: Mapping[str, Any],
) -> tuple[str, ...]:
    """Write an adapter as a folder for mlx-lm, with the same effect.

    mlx-lm has no adapter of a tied embedding's inputs, and no LoRA of an embedding
    beside DoRA: then the embedding's factors have names that mlx-lm refuses.

    Args:
        folder: exists and is empty.
        config: of the base; None if unknown: it is then assumed to be tied.
        base: path or Hub id of the base, stored in the config.
        metadata: the mlx-openelm entry of the config.

    Returns:
        Notes for the user.

    Raises:
        OpenELMError: the adapter does not fit the base, or no folder can hold it.
        OSError: writing failed.
    """
    _check(adapter, config)
    inputs_only = not adapter.adapts_tied_head and (
        _is_tied(config) or adapter.method == "dora"
    )
    if not inputs_only:
        _refuse_mixed(adapter, "an mlx-lm adapter")
    modules = adapter.modules.values()
    rank, scale = shared = _share_settings(modules)
    tensors: dict[str, mx.array] = {}
    for name, module in adapter.modules.items():
        path, parts = to_module(f"{name}.weight"), _with_settings(module, shared)
        name_a, name_b = FACTORS[inputs_only and module.is_embedding]
        leaves = {"a": name_a, "b": name_b, "m": "m"}
        tensors |= {f"{path}.{leaves[part]}": array for part, array in parts.items()}
    keys, num_layers = _name_keys(adapter, config)
    described = AdapterConfig(
        adapter.method,
        num_layers,
        keys,
        rank,
        scale,
        dropout=adapter.dropout,
        base=base,
        metadata=metadata,
    )
    write_adapter(folder, described, tensors)
    notes = []
    if inputs_only and TABLE in adapter.modules:
        notes.append(
            "The adapter changes the embedding for inputs only, and stock mlx-lm "
            "refuses it; `fuse` writes a model that mlx-lm opens."
        )
    if any(module.rank != rank for module in modules):
        notes.append(
            f"Padded all factors with zeros to rank {rank}: mlx-lm has one rank."
        )
    if any(module.scale != scale for module in modules):
        notes.append(
            f"Folded scales other than {scale:g} into lora_b: mlx-lm has one scale."
        )
    return tuple(notes)


def write_peft_adapter(
    folder: Path,
    adapter: Adapter,
    *,
    config: OpenELMConfig | None,
    base: str | None,
) -> tuple[str, ...]:
    """Write an adapter as a folder for PEFT, with Hugging Face's module names.

    mlx-swift ignores PEFT's patterns of ranks and alphas, so they are avoided where the
    same rank and alpha for all modules have exactly the same effect.

    Arguments, result and errors are those of `write_mlx_adapter`, but without metadata:
    PEFT would warn about an entry that it does not support.
    """
    _check(adapter, config)
    _refuse_mixed(adapter, "a PEFT adapter")
    _refuse_tied_head(adapter, _is_tied(config), "PEFT adapter")
    modules = {to_module(f"{n}.weight"): m for n, m in adapter.modules.items()}
    own = {path: _Settings(m.rank, m.scale) for path, m in modules.items()}
    shared = _share_settings(modules.values())
    is_exact = all(_is_exact(settings, shared) for settings in own.values())
    settings = dict.fromkeys(modules, shared) if is_exact else own
    rank = most_common(s.rank for s in settings.values())
    alpha = most_common(s.alpha for s in settings.values())
    keys, num_layers = _name_keys(adapter, config)
    if config and num_layers < config.num_transformer_layers:
        keys = tuple(modules)  # PEFT applies relative keys to all blocks
    tensors: dict[str, mx.array] = {}
    for path, module in modules.items():
        for part, array in _with_settings(module, settings[path]).items():
            tensors[f"{PEFT_PREFIX}{_torch_name(path, module, part)}"] = array.T
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": list(keys),
        "r": rank,
        "rank_pattern": {p: s.rank for p, s in settings.items() if s.rank != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {p: s.alpha for p, s in settings.items() if s.alpha != alpha},
        "lora_dropout": adapter.dropout,
        "use_dora": adapter.method == "dora",
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    write_json(folder / CONFIG, described)
    save_tensors(folder / PEFT_ADAPTER.single, tensors, format="pt")
    notes = []
    if settings != own:
        notes.append(
            f"Wrote all modules with rank {rank}, with exactly the same effect."
        )
    elif not is_exact:
        notes.append(
            "The ranks or alphas differ between modules, which mlx-swift ignores in a "
            "PEFT adapter: it would scale them wrongly. Use `to` mlx for it."
        )
    if adapter.method == "dora":
        notes.append("mlx-swift does not load DoRA from a PEFT adapter; use `to` mlx.")
    if adapter.metadata:
        notes.append(
            "Left out template and provenance, which PEFT's config cannot hold."
        )
    return tuple(notes)


def corenet_adapter_tensors(
    adapter: Adapter, tensors: Mapping[str, TensorToWrite]
) -> tuple[dict[str, TensorToWrite], tuple[str, ...]]:
    """Return the tensors of a CoreNet checkpoint with a base and its adapter.

    CoreNet's configs have alpha = rank, so any other scale is folded into B.

    Args:
        adapter: fits the base (`check_fits`, `with_rows`).
        tensors: of the base, under CoreNet's names.

    Returns:
        The tensors in CoreNet's order, and notes for the user.

    Raises:
        OpenELMError: CoreNet does not support such an adapter.
    """
    paths = {_module(name): name.removesuffix(".weight") for name in tensors}
    assert adapter.modules.keys() <= paths.keys(), "the caller checks that it fits"
    _refuse_tied_head(adapter, "lm_head" not in paths, "CoreNet adapter")
    checkpoint: dict[str, TensorToWrite] = {}
    for name, tensor in tensors.items():
        module = adapter.modules.get(_module(name))
        if module is None:
            checkpoint[name] = tensor
            continue
        path = name.removesuffix(".weight")
        checkpoint[f"{path}{BASE_LAYER}"] = tensor
        for part, shape in module.part_shapes.items():
            checkpoint[_torch_name(path, module, part, ".lora")] = TensorToWrite(
                shape[::-1], mx.float32, _corenet_reader(module, part)
            )
    notes = []
    if any(module.scale != 1 for module in adapter.modules.values()):
        notes.append("Folded the scale into lora_B: CoreNet's scale is 1.")
    return checkpoint, tuple(notes)


def _corenet_reader(module: AdapterModule, part: str) -> Callable[[], mx.array]:
    def read() -> mx.array:
        array = module.read()[part].T
        return array * module.scale if part == "b" else array

    return read


def _torch_name(path: str, module: AdapterModule, part: str, adapter: str = "") -> str:
    """Return a part's name in PEFT, or with the suffix `adapter` in CoreNet."""
    if part == "m":
        return f"{path}.lora_magnitude_vector{adapter}"
    kind, end = ("embedding_", "") if module.is_embedding else ("", ".weight")
    return f"{path}.lora_{kind}{part.upper()}{adapter}{end}"


# Checks --------------------------------------------------------------------------


def _check(adapter: Adapter, config: OpenELMConfig | None) -> None:
    """Raise OpenELMError if the adapter does not fit the base."""
    if config is not None:
        check_fits(adapter, config)


def _refuse_mixed(adapter: Adapter, what: str) -> None:
    plain = [n for n, module in adapter.modules.items() if module.method == "lora"]
    if adapter.method == "dora" and plain:
        raise OpenELMError(
            f"{adapter.name} has LoRA on {', '.join(plain)} and DoRA on the rest; "
            f"{what} cannot be both; merge it into its base with `merge`."
        )


def _refuse_tied_head(adapter: Adapter, is_tied: bool, what: str) -> None:
    if TABLE in adapter.modules and adapter.adapts_tied_head and is_tied:
        raise OpenELMError(
            f"{adapter.name} adapts inputs and logits of a tied base, as mlx-lm does, "
            f"but a {what} changes only the inputs; merge it into its base with "
            "`merge`."
        )


def _is_tied(config: OpenELMConfig | None) -> bool:
    return config is None or config.share_input_output_layers


# Settings shared by all modules --------------------------------------------------


def _name_keys(
    adapter: Adapter, config: OpenELMConfig | None
) -> tuple[tuple[str, ...], int]:
    """Return the keys of the modules, and the number of last blocks that they are in.

    The keys are relative to a block (mlx-lm's convention) if exactly the last blocks of
    a known base are adapted, all in the same modules; else they are full paths.
    """
    blocks: dict[int, list[str]] = {}
    others = []
    for name in adapter.modules:
        if match := re.fullmatch(r"layers\.([0-9]{1,4})\.(.+)", name):
            blocks.setdefault(int(match[1]), []).append(match[2])
        else:
            others.append(to_module(f"{name}.weight"))
    count = config.num_transformer_layers if config else max(blocks, default=0) + 1
    uniform = len({frozenset(inner) for inner in blocks.values()}) == 1
    if config and uniform and sorted(blocks) == list(range(count - len(blocks), count)):
        return (*blocks[count - 1], *others), len(blocks)
    return tuple(to_module(f"{name}.weight") for name in adapter.modules), count


def _module(corenet_name: str) -> str:
    return to_corenet(corenet_name).removesuffix(".weight")


def most_common(values: Iterable[_Number]) -> _Number:
    """Return the value that occurs most often, on ties the first."""
    return Counter(values).most_common(1)[0][0]


class _Settings(NamedTuple):
    """Rank and scale of a module."""

    rank: int
    scale: float

    @property
    def alpha(self) -> float:
        """PEFT's alpha (scale x rank), an int if it is a whole number."""
        alpha = self.scale * self.rank
        return int(alpha) if alpha == int(alpha) else alpha


def _share_settings(modules: Collection[AdapterModule]) -> _Settings:
    """Return a rank and a scale that all modules can be written with."""
    rank = max(module.rank for module in modules)
    return _Settings(rank, most_common([m.scale for m in modules if m.scale] or [0.0]))


def _is_exact(own: _Settings, shared: _Settings) -> bool:
    """Whether `_with_settings` does not round: the factor of B is a power of two."""
    factor = 1.0 if own.scale == shared.scale else own.scale / shared.scale
    return abs(math.frexp(factor)[0]) in (0, 0.5)


def _with_settings(module: AdapterModule, settings: _Settings) -> dict[str, mx.array]:
    """Return a module's arrays with another rank and scale, and the same effect."""
    parts, spare = module.read(), settings.rank - module.rank
    if module.scale != settings.scale:
        parts["b"] = parts["b"] * (module.scale / settings.scale)
    parts["a"] = mx.pad(parts["a"], [(0, 0), (0, spare)])
    parts["b"] = mx.pad(parts["b"], [(0, spare), (0, 0)])
    return parts
