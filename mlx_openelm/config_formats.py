"""Readers of other tools' configs and of tensor shapes.

A reader of a config yields dicts of OpenELMConfig's fields. The first one creates an
OpenELMConfig, each further one replaces fields of it, and every result is validated
before the reader continues.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.layerwise_scaling import (
    FFN_DIM_DIVISOR,
    FFN_MULTIPLIERS,
    QKV_MULTIPLIERS,
    is_size,
    preset_fields,
    scaled_fields,
)
from mlx_openelm.message_parts import list_names

_FIXED_VALUES = {  # keys of Hugging Face's config with the same value in all OpenELMs
    "ffn_with_glu": True,
    "normalize_qk_projections": True,
    "activation_fn_name": "swish",
    "normalization_layer_name": "rms_norm",
}

_LAYER_PARTS = (
    *("attn.qkv_proj", "attn.q_norm", "attn.k_norm", "attn.out_proj", "attn_norm"),
    *("ffn.proj_1", "ffn.proj_2", "ffn_norm"),
)


def read_config(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Return the reader of a Hugging Face, mlx-lm, CoreNet or Apple-MLX config.

    Raises:
        OpenELMError: the config has none of these formats.
    """
    if "model_dim" in config:
        return read_hugging_face(config)
    if "model_name" in config:
        return read_apple_mlx(config)
    if "model" in config or any(key.startswith("model.") for key in config):
        return read_corenet(config)
    raise OpenELMError(
        "The config is not an OpenELM's: it has neither model_dim (Hugging Face), "
        "model_name (Apple's MLX) nor model.language_modeling (CoreNet); its keys are "
        f"{sorted(config)[:12]}."
    )


def read_hugging_face(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Read a config.json of Hugging Face or mlx-lm.

    The multipliers are applied first; explicit per-layer lists then replace the result.
    """
    model_type = config.get("model_type", "openelm")
    if model_type != "openelm":
        raise OpenELMError(
            f'The config has model_type "{model_type}"; only "openelm" is supported.'
        )
    for key, value in _FIXED_VALUES.items():
        if config.get(key, value) != value:
            raise OpenELMError(
                f"The config has {key} = {config[key]!r}; OpenELM has {value!r}."
            )
    wrong = [
        f"{key} = {config.get(key)!r}"
        for key in ("model_dim", "head_dim", "vocab_size")
        if not is_size(config.get(key))
    ]
    if wrong:
        raise OpenELMError(
            f"The config has {', '.join(wrong)}; expected positive integers below "
            "2**31."
        )
    num_layers = config.get("num_transformer_layers")
    if not isinstance(num_layers, int):
        lists = (config.get("ffn_dims"), config.get("num_query_heads"))
        num_layers = next((len(x) for x in lists if isinstance(x, list)), None)
    if num_layers is None:
        raise OpenELMError("The config lacks num_transformer_layers.")
    groups = config.get("num_gqa_groups") or 4
    yield {
        **scaled_fields(
            num_layers=num_layers,
            model_dim=config["model_dim"],
            head_dim=config["head_dim"],
            num_gqa_groups=groups,
            qkv_multipliers=config.get("qkv_multipliers", QKV_MULTIPLIERS),
            ffn_multipliers=config.get("ffn_multipliers", FFN_MULTIPLIERS),
            ffn_dim_divisor=config.get("ffn_dim_divisor", FFN_DIM_DIVISOR),
            pairs=False,
        ),
        "vocab_size": config["vocab_size"],
        "max_context_length": config.get("max_context_length", 2048),
    }
    yield {
        "rope_freq_constant": float(config.get("rope_freq_constant", 10000)),
        "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "share_input_output_layers": config.get("share_input_output_layers", True),
    }
    explicit: dict[str, Any] = {
        name: _per_layer(name, config[name], num_layers)
        for name in ("num_query_heads", "num_kv_heads", "ffn_dims")
        if config.get(name) is not None
    }
    if "num_query_heads" in explicit and "num_kv_heads" not in explicit:
        explicit["num_kv_heads"] = tuple(
            q // groups for q in explicit["num_query_heads"]
        )
    yield explicit


def read_apple_mlx(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Read a config of Apple's MLX code, which contains the name of a released size."""
    fields = preset_fields(config["model_name"])
    yield {**fields, "vocab_size": config.get("vocab_size", 32128)}
    yield {"max_context_length": config.get("max_context_length", 2048)}


def read_corenet(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Read a CoreNet YAML: nested, or flat with dotted keys."""
    flat = _flatten(config)
    prefix = "model.language_modeling."
    model_name = flat.get(f"{prefix}general_gpt.model_name")
    if model_name is None:
        raise OpenELMError(
            "The CoreNet config lacks model.language_modeling.general_gpt.model_name."
        )
    vocab_size = flat.get(f"{prefix}general_gpt.vocab_size", 32000)
    pad = flat.get(f"{prefix}general_gpt.padding_index")
    if pad is not None:  # one more row, then a multiple of 128 rows
        vocab_size = max(vocab_size, math.ceil((pad + 1) / 128) * 128)
    yield {**preset_fields(model_name), "vocab_size": vocab_size}
    yield {
        "max_context_length": flat.get(f"{prefix}general_gpt.max_context_length", 2048)
    }


def read_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Infer the fields from tensor shapes (CoreNet names).

    Raises:
        OpenELMError: the tensors are not an OpenELM's; missing ones are named.
    """

    def shape(name: str, num_dims: int) -> tuple[int, ...]:
        if name not in shapes:
            raise OpenELMError(
                f"This is not an OpenELM: the tensor {name} is missing; the tensors "
                f"are {list_names(sorted(shapes), quoted=False)}."
            )
        if len(shapes[name]) != num_dims:
            raise OpenELMError(
                f"This is not an OpenELM: {name} has shape {shapes[name]}, "
                f"expected {num_dims} dimension(s)."
            )
        return shapes[name]

    V, D = shape("token_embeddings.weight", 2)
    parts = (name.split(".", 2) for name in shapes)
    numbers = {part[1] for part in parts if len(part) == 3 and part[0] == "layers"}
    num_layers = 0
    while str(num_layers) in numbers:
        num_layers += 1
    missing = [
        name
        for i in range(num_layers)
        for name in (f"layers.{i}.{part}.weight" for part in _LAYER_PARTS)
        if name not in shapes
    ]
    if missing:
        raise OpenELMError(
            "This is not an OpenELM, or an incomplete one: it lacks "
            f"{list_names(missing, most=10, quoted=False)}; its tensors are "
            f"{list_names(sorted(shapes), quoted=False)}."
        )
    (H,) = shape("layers.0.attn.q_norm.weight", 1)
    query_heads, kv_heads, ffn_dims = [], [], []
    for i in range(num_layers):
        _, query_width = shape(f"layers.{i}.attn.out_proj.weight", 2)
        qkv_width, _ = shape(f"layers.{i}.attn.qkv_proj.weight", 2)
        if H < 1 or query_width % H or (qkv_width - query_width) % (2 * H):
            raise OpenELMError(
                f"Layer {i} is not an OpenELM's: qkv_proj has {qkv_width} rows and "
                f"out_proj {query_width} columns, which heads of width {H} do not give."
            )
        query_heads.append(query_width // H)
        kv_heads.append((qkv_width - query_width) // (2 * H))
        ffn_dims.append(shape(f"layers.{i}.ffn.proj_2.weight", 2)[1])
    return {
        "model_dim": D,
        "head_dim": H,
        "num_query_heads": tuple(query_heads),
        "num_kv_heads": tuple(kv_heads),
        "ffn_dims": tuple(ffn_dims),
        "vocab_size": V,
        "share_input_output_layers": "lm_head.weight" not in shapes,
    }


def _per_layer(name: str, value: object, num_layers: int) -> tuple[int, ...]:
    values = [value] * num_layers if isinstance(value, int) else value
    if not isinstance(values, list | tuple) or len(values) != num_layers:
        raise OpenELMError(
            f"The config's {name} is {value!r}; expected {num_layers} numbers, "
            "one per layer."
        )
    return tuple(values)


def _flatten(
    config: Mapping[str, Any], prefix: str = "", depth: int = 0
) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if depth > 50 or len(flat) > 10_000:  # YAML aliases can even be recursive
            raise ValueError("it is nested too deeply or too long")
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.", depth + 1)
        else:
            flat[f"{prefix}{key}"] = value
    return flat
