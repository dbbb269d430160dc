"""Which other tools open a model folder, by the rules of their own readers.

mlx-swift computes heads and FFN widths in float32 from constants and ignores the lists
of the config; mlx-lm computes FFN widths in float64 from `ffn_multipliers`. Both rules
are repeated here as they are there. This module does not import mlx.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.layerwise_scaling import (
    FFN_MULTIPLIERS,
    QKV_MULTIPLIERS,
    is_size,
    make_divisible,
)
from mlx_openelm.message_parts import count_of

MLX_LM, LM_STUDIO, MLX_SWIFT = "mlx-lm", "LM Studio", "mlx-swift"
LLAMA_CPP, TRANSFORMERS = "llama.cpp", "transformers"

_KEYS = (  # without a default in mlx-lm and mlx-swift
    *("head_dim", "num_transformer_layers", "model_dim", "vocab_size"),
    "ffn_dim_divisor",
)
_LISTS = ("num_query_heads", "num_kv_heads", "ffn_multipliers")  # the same in mlx-lm
_UNTIED = "it has an untied output head"
_SWIFT_GROUPS, _SWIFT_EPS, _SWIFT_BASE = 4, 1e-6, 10_000.0


@dataclass(frozen=True, slots=True)
class Opening:
    """Whether a tool opens a model folder.

    Attributes:
        note: the reason why not, or what has to be done first.
    """

    opens: bool
    note: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, ["yes" if self.opens else "no", self.note]))


def check_tools(
    config: OpenELMConfig,
    stored: Mapping[str, Any] | None = None,
    *,
    has_tokenizer: bool = True,
) -> dict[str, Opening]:
    """Return for each tool whether it opens a model.

    Args:
        stored: config.json; default: as `convert` writes it.
    """
    stored = config.to_dict() if stored is None else stored
    no_tokenizer = "" if has_tokenizer else "the folder has no tokenizer"
    mlx_lm = no_tokenizer or _describe_mlx_lm(config, stored)
    swift = no_tokenizer or _describe_swift(config, stored)
    bits = stored.get("quantization")
    mixed = isinstance(bits, dict) and any(
        type(v) in (dict, bool) for v in bits.values()
    )
    engine = "engines of 5 August 2026 or later" if mixed else ""
    remote_code = stored.get("auto_map")
    return {
        MLX_LM: Opening(not mlx_lm, mlx_lm),
        LM_STUDIO: Opening(not mlx_lm, mlx_lm or engine),
        MLX_SWIFT: Opening(not swift, swift),
        LLAMA_CPP: _after("gguf", describe_llama_cpp_limit(config)),
        TRANSFORMERS: Opening(True) if remote_code else _after("hf", ""),
    }


def describe_closed(config: OpenELMConfig) -> str:
    """Return a sentence on the tools that do not open a shape; empty if all do."""
    closed = [
        f"{tool} ({opening.note})"
        for tool, opening in check_tools(config).items()
        if not opening.opens
    ]
    return f"This shape does not open in {' and '.join(closed)}." if closed else ""


def describe_llama_cpp_limit(config: OpenELMConfig) -> str:
    """Return why llama.cpp's OpenELM cannot hold a model; empty if it can."""
    return "" if config.share_input_output_layers else _UNTIED


def _after(to: str, reason: str) -> Opening:
    return Opening(not reason, reason or f"after `mlx-openelm convert --to {to}`")


def _describe_mlx_lm(config: OpenELMConfig, stored: Mapping[str, Any]) -> str:
    """Return why mlx-lm does not open it, or an empty string."""
    if problem := _describe_keys(stored):
        return problem
    for name in _LISTS:
        values = stored.get(name)
        if not isinstance(values, list) or not all(map(_is_number, values)):
            return f"{name} in config.json is not a list of numbers"
    divisor = stored["ffn_dim_divisor"]
    return _compare(
        config,
        stored["num_query_heads"],
        stored["num_kv_heads"],
        [make_divisible(m * config.model_dim, divisor) for m in stored[_LISTS[2]]],
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _describe_keys(stored: Mapping[str, Any]) -> str:
    if stored.get("model_type") != "openelm":
        return "model_type in config.json is not openelm"
    missing = [name for name in _KEYS if not is_size(stored.get(name))]
    return f"config.json lacks {', '.join(missing)}" if missing else ""


def _describe_swift(config: OpenELMConfig, stored: Mapping[str, Any]) -> str:
    """Return why mlx-swift does not open it, or an empty string."""
    if problem := _describe_keys(stored):
        return problem
    if not config.share_input_output_layers:
        return _UNTIED
    if config.rms_norm_eps != _SWIFT_EPS or config.rope_freq_constant != _SWIFT_BASE:
        return (
            f"its RMSNorm eps is {config.rms_norm_eps:g} and its RoPE base "
            f"{config.rope_freq_constant:g}; there they are 1e-06 and 10000"
        )
    if config.num_transformer_layers == 1:
        return "it has one layer"  # a division by the number of layers less one
    D, H = config.model_dim, config.head_dim
    heads = [
        _round_in_float32(multiplier * np.float32(D), H * _SWIFT_GROUPS) // H
        for multiplier in _interpolate_in_float32(QKV_MULTIPLIERS, config)
    ]
    ffn_dims = [
        _round_in_float32(multiplier * np.float32(D), stored["ffn_dim_divisor"])
        for multiplier in _interpolate_in_float32(FFN_MULTIPLIERS, config)
    ]
    kv_heads = [heads // _SWIFT_GROUPS for heads in heads]
    return _compare(config, heads, kv_heads, ffn_dims)


def _interpolate_in_float32(
    multipliers: tuple[float, float], config: OpenELMConfig
) -> list[np.float32]:
    """Return one multiplier per layer, rounded to two decimals, halves up."""
    first, last = map(np.float32, multipliers)
    step = (last - first) / np.float32(config.num_transformer_layers - 1)
    hundred, half = np.float32(100), np.float32(0.5)
    return [
        np.floor((first + step * np.float32(i)) * hundred + half) / hundred
        for i in range(config.num_transformer_layers)
    ]


def _round_in_float32(value: np.float32, divisor: int) -> int:
    """`make_divisible` in float32."""
    half = np.float32(divisor) / np.float32(2)
    rounded = max(divisor, int(value + half) // divisor * divisor)
    too_small = np.float32(rounded) < np.float32(0.9) * value
    return rounded + divisor if too_small else rounded


def _compare(
    config: OpenELMConfig,
    query_heads: Sequence[int],
    kv_heads: Sequence[int],
    ffn_dims: Sequence[int],
) -> str:
    """Return the first size that a tool computes differently, or an empty string."""
    for what, theirs, ours in (
        ("query heads", query_heads, config.num_query_heads),
        ("key-value heads", kv_heads, config.num_kv_heads),
        ("an FFN width of", ffn_dims, config.ffn_dims),
    ):
        if len(theirs) != len(ours):
            return f"config.json has {count_of(len(theirs), 'layer')} of {len(ours)}"
        for layer, (their, our) in enumerate(zip(theirs, ours, strict=True)):
            if their != our:
                sizes = f"{their} {what}" if "heads" in what else f"{what} {their}"
                return f"it computes {sizes} in layer {layer}, which has {our}"
    return ""
