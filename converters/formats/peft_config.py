"""PEFT's adapter_config.json: what it says of every module, and what is refused."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.formats.adapter_tensors import Method
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.adapter_folder import is_number, read_dropout

_ONLY: Mapping[str, tuple[object, ...]] = {  # what can be carried over
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_dora": (None, True, False),
    "use_rslora": (None, True, False),
    # Its other values have changed the base.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
_OTHERS = {  # read below, or without a meaning for a finished adapter
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("auto_mapping", "peft_version", "eva_config", "runtime_config"),
    *("megatron_core", "qalora_group_size"),
}


@dataclass(frozen=True, slots=True)
class Pattern:
    """A number for every module, with exceptions by the end of the module's path."""

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
    """What matters of a LoRA or DoRA adapter's config.

    Attributes:
        roots_rank: scale is alpha / sqrt(rank) (rsLoRA), not alpha / rank.
    """

    method: Method
    ranks: Pattern
    alphas: Pattern
    roots_rank: bool
    dropout: float
    base: str | None

    def scale_of(self, target: str, rank: int) -> float:
        return self.alphas.of(target) / (math.sqrt(rank) if self.roots_rank else rank)


def read_peft_config(raw: Mapping[str, Any], path: Path) -> PeftConfig:
    """Read the config that stands at `path`.

    What makes an adapter more, or other, than factors of weights is refused; so is what
    a newer PEFT may say, unless it is empty or false.

    Raises:
        OpenELMError: all that cannot be carried over is named, or what is no number.
    """
    foreign = [
        f"{key!a}: {value!a:.80}"
        for key, value in raw.items()
        if (value not in _ONLY[key] if key in _ONLY else value and key not in _OTHERS)
    ]
    if foreign:
        raise OpenELMError(
            f"{path} says {', '.join(foreign)}, which is more than LoRA or DoRA of "
            "weights; merge the adapter into its base with PEFT (merge_and_unload) and "
            "convert the outcome."
        )
    base = raw.get("base_model_name_or_path")
    return PeftConfig(
        method="dora" if raw.get("use_dora") else "lora",
        ranks=_read_pattern(raw, "r", "rank_pattern", path),
        alphas=_read_pattern(raw, "lora_alpha", "alpha_pattern", path),
        roots_rank=bool(raw.get("use_rslora")),
        dropout=read_dropout(raw, "lora_dropout", path),
        base=base if isinstance(base, str) and base else None,
    )


def _read_pattern(
    raw: Mapping[str, Any], key: str, pattern_key: str, path: Path
) -> Pattern:
    default, pattern = raw.get(key, 8), raw.get(pattern_key) or {}  # 8 is PEFT's own
    if not is_number(default):
        raise OpenELMError(f"{path} says {key} {default!a:.80}; expected a number.")
    if not isinstance(pattern, dict) or not all(map(is_number, pattern.values())):
        raise OpenELMError(
            f"{path} says {pattern_key} {pattern!a:.80}; expected a number of each "
            "module."
        )
    exceptions = {
        ending.replace("\\.", ".").removesuffix("$"): value
        for ending, value in pattern.items()
    }
    foreign = [ascii(end) for end in exceptions if not re.fullmatch(r"\^?[\w.]+", end)]
    if foreign:
        raise OpenELMError(
            f"{path} has regular expressions in {pattern_key}, {', '.join(foreign)}; "
            "write the modules' paths in full."
        )
    return Pattern(default, exceptions)
