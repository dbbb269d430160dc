"""Layer-wise scaling (heads and FFN width of each layer), and the released sizes.

Source of the formula: Mehta et al., "OpenELM" (arXiv 2404.14619), section 2.1, as
applied in the released checkpoints. The shapes reverse, crown and frame are named after
Baroian and Notebomer, arXiv 2509.06518.
"""

from collections.abc import Sequence
from typing import Any

from mlx_openelm.errors import OpenELMError

QKV_MULTIPLIERS = (0.5, 1.0)  # first and last layer, all released sizes
FFN_MULTIPLIERS = (0.5, 4.0)
FFN_DIM_DIVISOR = 256
SHAPES = {  # whether first and last are exchanged, and whether both ends are equal
    "layerwise": (False, False),
    "reverse": (True, False),
    "crown": (False, True),
    "frame": (True, True),
}
MAX_LAYERS = 10_000  # prevents huge lists from a damaged config

PRESETS: dict[str, dict[str, Any]] = {
    "gpt-test": {
        "num_layers": 1,
        "model_dim": 128,
        "head_dim": 64,
        "num_gqa_groups": 1,
        "qkv_multipliers": (0.25, 0.5),
        "ffn_multipliers": (0.25, 0.75),
    },
    "270M": {"num_layers": 16, "model_dim": 1280, "head_dim": 64},
    "450M": {"num_layers": 20, "model_dim": 1536, "head_dim": 64},
    "1.1B": {"num_layers": 28, "model_dim": 2048, "head_dim": 64},
    "3B": {"num_layers": 36, "model_dim": 3072, "head_dim": 128},
}


def preset_fields(name: str) -> dict[str, Any]:
    """Return the fields of a released size by any of its names, as `scaled_fields`.

    Raises:
        OpenELMError: no released size has this name.
    """
    key = name.rsplit("/", 1)[-1].removeprefix("OpenELM-")
    key = key.removesuffix("-Instruct").replace("_", ".")
    if key not in PRESETS:
        raise OpenELMError(
            f"{name!r} is not a released OpenELM; choose {', '.join(PRESETS)}."
        )
    return scaled_fields(**PRESETS[key])


def scaled_fields(
    *,
    num_layers: int,
    model_dim: int,
    head_dim: int,
    num_gqa_groups: int = 4,
    qkv_multipliers: float | Sequence[float] = QKV_MULTIPLIERS,
    ffn_multipliers: float | Sequence[float] = FFN_MULTIPLIERS,
    ffn_dim_divisor: int = FFN_DIM_DIVISOR,
    shape: str = "layerwise",
    pairs: bool = True,
) -> dict[str, Any]:
    """Return the widths and per-layer lists of an OpenELMConfig, not validated.

    The arguments are those of `OpenELMConfig.scaled` and, for the multipliers, of
    `interpolate_multipliers`; the result holds model_dim, head_dim, num_query_heads,
    num_kv_heads and ffn_dims.

    Raises:
        OpenELMError: an impossible number of layers or of multipliers.
    """
    if not 1 <= num_layers <= MAX_LAYERS:
        raise OpenELMError(
            f"The config has {num_layers} layers; an OpenELM has 1 to {MAX_LAYERS}."
        )
    query_heads = tuple(
        make_divisible(model_dim * m, head_dim * num_gqa_groups) // head_dim
        for m in interpolate_multipliers(
            qkv_multipliers, num_layers, shape, pairs=pairs
        )
    )
    return {
        "model_dim": model_dim,
        "head_dim": head_dim,
        "num_query_heads": query_heads,
        "num_kv_heads": tuple(q // num_gqa_groups for q in query_heads),
        "ffn_dims": tuple(
            make_divisible(m * model_dim, ffn_dim_divisor)
            for m in interpolate_multipliers(
                ffn_multipliers, num_layers, shape, pairs=pairs
            )
        ),
    }


def make_divisible(value: float, divisor: int) -> int:
    """Return the multiple of `divisor` nearest to `value`, never below 90 % of it."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def interpolate_multipliers(
    multipliers: float | Sequence[float],
    num_layers: int,
    shape: str = "layerwise",
    *,
    pairs: bool = True,
) -> list[float]:
    """Return one multiplier per layer, from a scalar, a (first, last) pair or a list.

    A pair is interpolated linearly over the layers and rounded to two decimals, as
    numpy rounds: a multiple of 0.01 by ties to even of the hundredfold value.

    Args:
        shape: of a pair: "layerwise" from first to last, "reverse" from last to first,
            "crown" from first to last in the middle and back to first, "frame" from
            last to first in the middle and back to last.
        pairs: two multipliers of two layers are a pair, as in CoreNet; else one for
            each layer, as in mlx-lm.
    """
    if isinstance(multipliers, int | float):
        return [float(multipliers)] * num_layers
    if len(multipliers) == num_layers and not (num_layers == 2 and pairs):
        return [float(m) for m in multipliers]
    if len(multipliers) != 2:
        raise OpenELMError(
            f"There are {len(multipliers)} multipliers, {list(multipliers)}; expected "
            f"one, a (first, last) pair, or {num_layers}."
        )
    exchanged, symmetric = SHAPES[shape]
    start, end = reversed(multipliers) if exchanged else multipliers
    layers = range(num_layers)
    places = [min(i, num_layers - 1 - i) if symmetric else i for i in layers]
    spans = max((num_layers - 1) // (2 if symmetric else 1), 1)
    step = (end - start) / spans
    exact = [end if place == spans else start + place * step for place in places]
    return [round(m * 100) / 100 for m in exact]


def is_size(value: object) -> bool:
    """Return whether `value` is a positive integer below 2**31, not a bool."""
    return type(value) is int and 0 < value < 2**31
