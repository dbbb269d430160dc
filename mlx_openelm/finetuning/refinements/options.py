"""Options of a teacher, of quantization-aware training and of refinements of LoRA.

`FinetuneRecipe` inherits them.
"""

import math
from dataclasses import dataclass, fields

from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.quantization import AFFINE_BITS
from mlx_openelm.options import MODEL_PANEL, option
from mlx_openelm.paths import PathText

TEACHER_PANEL = "Teacher"
_OPTIMIZATION = "Optimization"
TEACHER_TOP_K = 64
_BIG = 2**31 - 1
_ANSWERS = ("sft", "distill")
_USED_BY = {  # option -> the objectives that use it; others are used by all
    **dict.fromkeys(("z_loss", "mask_prompt", "turns", "completion_key"), _ANSWERS),
    **dict.fromkeys(("dpo_loss", "dpo_beta"), ("dpo",)),
    **dict.fromkeys(("teacher", "distill_weight", "temperature"), ("distill",)),
    **dict.fromkeys(("teacher_cache", "teacher_top_k"), ("distill",)),
    "orpo_weight": ("orpo",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinementOptions:
    """Options that `FinetuneRecipe` adds to its own."""

    teacher: PathText | None = option(
        None,
        "Model to learn from with {objective} distill: demo, a folder, or a Hub id.",
        panel=TEACHER_PANEL,
    )
    distill_weight: float = option(
        0.5,
        "Weight of the teacher's distribution; the rest is that of the plain loss.",
        panel=TEACHER_PANEL,
        least=0.0,
        most=1.0,
    )
    temperature: float = option(
        1.0,
        "Divides the logits of both models in distill.",
        panel=TEACHER_PANEL,
        least=1e-2,
        most=1e3,
    )
    teacher_cache: PathText | None = option(
        None,
        "Folder in which the teacher's most likely tokens are kept, so that it is not "
        "in memory during training.",
        panel=TEACHER_PANEL,
    )
    teacher_top_k: int = option(
        TEACHER_TOP_K,
        "Most likely tokens of each position in {teacher_cache}.",
        panel=TEACHER_PANEL,
        least=1,
        most=_BIG,
    )
    quantize_aware: int | None = option(
        None,
        "Train the adapter on the weights that fuse --q-bits N will make of it.",
        panel=MODEL_PANEL,
    )
    rslora: bool = option(
        False,
        "Multiply {scale} by the square root of {rank} (rsLoRA: alpha / sqrt(rank)).",
        panel=MODEL_PANEL,
    )
    lora_plus_ratio: float = option(
        1.0,
        "Learning rate of the matrices B of linear layers, as a multiple of that of A "
        "(LoRA+: 16).",
        panel=_OPTIMIZATION,
        least=1e-3,
        most=1e6,
    )
    neftune_noise: float = option(
        0.0,
        "Noise on the embeddings in training (NEFTune: 5); 0 is off.",
        panel=_OPTIMIZATION,
        least=0.0,
        most=1e3,
    )
    orpo_weight: float = option(
        0.1,
        "Weight of the odds ratio in orpo.",
        panel=_OPTIMIZATION,
        least=0.0,
        most=1e3,
    )


def check_refinements(
    options: RefinementOptions,
    *,
    objective: str,
    fine_tune_type: str,
    dropout: float,
    rank_by_width: bool,
    z_loss: float,
) -> None:
    """Raise OpenELMError if these options do not fit the others of a recipe."""
    distills, adapts = objective == "distill", fine_tune_type != "full"
    for name in ("teacher", "teacher_cache"):
        if getattr(options, name) == "":
            raise OpenELMError(f"`{name}` is empty; pass a name, or leave it out.")
    if distills and options.teacher is None:
        raise OpenELMError("`objective` distill needs a `teacher`.")
    for field in fields(options):
        users = _USED_BY.get(field.name, (objective,))
        if objective not in users and getattr(options, field.name) != field.default:
            raise OpenELMError(
                f"`{field.name}` requires `objective` {' or '.join(users)}, not "
                f"{objective}."
            )
    if distills and z_loss and options.distill_weight == 1:
        raise OpenELMError(
            "`z_loss` is a part of the plain loss, which has no weight if "
            "`distill_weight` is 1; leave one of them out."
        )
    if options.teacher_top_k != TEACHER_TOP_K and options.teacher_cache is None:
        raise OpenELMError("`teacher_top_k` requires a `teacher_cache`.")
    if options.quantize_aware not in (None, *AFFINE_BITS):
        raise OpenELMError(
            f"`quantize_aware` is {options.quantize_aware}; MLX has "
            f"{', '.join(map(str, AFFINE_BITS))}."
        )
    if options.quantize_aware is not None and not adapts:
        raise OpenELMError(
            "`quantize_aware` trains an adapter; use `fine_tune_type` lora or dora."
        )
    if options.quantize_aware is not None and dropout:
        raise OpenELMError(
            "`quantize_aware` rounds the sum of weight and adapter, so `dropout` of "
            "the adapter alone is not possible; leave it out."
        )
    if options.rslora and (rank_by_width or not adapts):
        raise OpenELMError(
            "`rslora` depends on the rank, which must be one number for all modules of "
            "an adapter; pass `rank` 16, for example."
        )
    if options.lora_plus_ratio != 1 and not adapts:
        raise OpenELMError(
            "`lora_plus_ratio` is the learning rate of an adapter's matrices B; use "
            "`fine_tune_type` lora or dora."
        )


def adapter_scale(options: RefinementOptions, scale: float, rank: int) -> float:
    """Return the factor of the low-rank product, as stored with the adapter.

    rsLoRA (Kalajdzievski, arXiv 2312.03732) divides alpha by sqrt(rank), LoRA by rank;
    `scale` is alpha / rank.
    """
    return scale * math.sqrt(rank) if options.rslora else scale
