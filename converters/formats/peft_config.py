"""Read PEFT's adapter_config.json: rank and alpha of each module; reject the rest."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.formats.adapter_tensors import Method
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.adapter_folder import is_number, read_dropout

_SUPPORTED: Mapping[str, tuple[object, ...]] = {  # key -> supported values
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_dora": (None, True, False),
    "use_rslora": (None, True, False),
    # The other values modify the base.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
_ANY_VALUE = {  # read below, or irrelevant after training
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("auto_mapping", "peft_version", "eva_config", "runtime_config"),
    *("megatron_core", "qalora_group_size"),
}


@dataclass(frozen=True, slots=True)
class Pattern:
    """A number per module: a default, and exceptions by suffix of the module's path."""

    default: float
    exceptions: Mapping[str, float]

    def of(self, target: str) -> float:
        """Return the number of the module at this path in Hugging Face's model."""
        for ending, value in self.exceptions.items():
            if ending == f"^{target}" or f".{target}".endswith(f".{ending}"):
                return value
        return self.default


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The relevant settings of a LoRA or DoRA adapter.

    Attributes:
        use_rslora: the scale is alpha / sqrt(rank), not alpha / rank.
    """

    method: Method
    ranks: Pattern
    alphas: Pattern
    use_rslora: bool
    dropout: float
    base: str | None

    def scale_of(self, target: str, rank: int) -> float:
        return self.alphas.of(target) / (math.sqrt(rank) if self.use_rslora else rank)


def read_peft_config(raw: Mapping[str, Any], path: Path) -> PeftConfig:
    """Return the settings of a config.

    Settings that make an adapter more than factors of weights are rejected, and so are
    unknown ones (of a newer PEFT), unless they are empty or false.

    Args:
        path: for error messages.

    Raises:
        OpenELMError: settings are unsupported (all are named) or not numbers.
    """
    unsupported = [
        f"{key!a}: {value!a:.80}"
        for key, value in raw.items()
        if (
            value not in _SUPPORTED[key]
            if key in _SUPPORTED
            else value and key not in _ANY_VALUE
        )
    ]
    if unsupported:
        raise OpenELMError(
            f"{path} has unsupported settings: {', '.join(unsupported)}; merge the "
            "adapter into its base with PEFT (merge_and_unload) and convert the result."
        )
    base = raw.get("base_model_name_or_path")
    return PeftConfig(
        method="dora" if raw.get("use_dora") else "lora",
        ranks=_read_pattern(raw, "r", "rank_pattern", path),
        alphas=_read_pattern(raw, "lora_alpha", "alpha_pattern", path),
        use_rslora=bool(raw.get("use_rslora")),
        dropout=read_dropout(raw, "lora_dropout", path),
        base=base if isinstance(base, str) and base else None,
    )


def _read_pattern(
    raw: Mapping[str, Any], key: str, pattern_key: str, path: Path
) -> Pattern:
    default, pattern = raw.get(key, 8), raw.get(pattern_key) or {}  # 8 is PEFT's own
    if not is_number(default):
        raise OpenELMError(f"{path}: {key} is {default!a:.80}; expected a number.")
    if not isinstance(pattern, dict) or not all(map(is_number, pattern.values())):
        raise OpenELMError(
            f"{path}: {pattern_key} is {pattern!a:.80}; expected a number per module."
        )
    exceptions = {
        ending.replace("\\.", ".").removesuffix("$"): value
        for ending, value in pattern.items()
    }
    unsupported = [
        ascii(end) for end in exceptions if not re.fullmatch(r"\^?[\w.]+", end)
    ]
    if unsupported:
        raise OpenELMError(
            f"{path}: {pattern_key} has regular expressions, which are not supported "
            f"({', '.join(unsupported)}); write the modules' paths in full."
        )
    return Pattern(default, exceptions)
