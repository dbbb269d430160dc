"""What a run will take, reckoned from its recipe: steps, tokens, memory, FLOPs."""

import math
from dataclasses import dataclass
from pathlib import Path

from converters.pretraining.corpus_files import find_files
from converters.pretraining.recipe import PretrainRecipe
from mlx_openelm.config import LLAMA_PIECES, OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.tokenizer import Tokenizer

PEAK_FLOPS = {  # dense bfloat16, by a part of torch's device name (makers' data sheets)
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
UTILISATION = 0.4  # of an A100's peak, that its days are reckoned with


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device; `total` is what it must have at least.

    Attributes:
        copies: weights in the bits of the computation; of a sharded model, what of it
            is whole at once.
        activations: at their most, the logits included.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.copies
            + self.activations
        )


@dataclass(frozen=True, slots=True)
class PretrainingPlan:
    """A run's sizes.

    Attributes:
        devices: that share a step; `accumulation` passes of `micro_batch_size`
            sequences each.
        tokens_per_step: positions of the batch, padded ones included.
        a100_days: of one A100 at `UTILISATION` of its peak.
        memory: on each device by "ddp" and "fsdp".
        missing: what is not there yet, a sentence each.
    """

    config: OpenELMConfig
    devices: int
    micro_batch_size: int
    accumulation: int
    tokens_per_step: int
    steps: int
    tokens: int
    flops_per_token: float
    flops: float
    a100_days: float
    memory: dict[str, Memory]
    missing: tuple[str, ...]


def plan_pretraining(
    recipe: PretrainRecipe, *, devices: int | None = None
) -> PretrainingPlan:
    """Reckon a run; its text need not be there.

    Args:
        devices: default: as many as do a step without accumulation.

    Raises:
        OpenELMError: the devices do not divide the batch, or the recipe is unusable.
    """
    missing: list[str] = []
    config = _size_up(recipe, missing)
    missing += _missing_text(recipe)
    micro = recipe.micro_batch_size or recipe.batch_size
    if devices is None:
        devices = max(1, recipe.batch_size // micro)
    share = share_batch(recipe, devices)
    micro = min(micro, share)
    length = config.max_context_length
    tokens_per_step = recipe.batch_size * length
    flops_per_token = count_flops_per_token(config, length)
    flops = flops_per_token * tokens_per_step * recipe.steps
    return PretrainingPlan(
        config=config,
        devices=devices,
        micro_batch_size=micro,
        accumulation=math.ceil(share / micro),
        tokens_per_step=tokens_per_step,
        steps=recipe.steps,
        tokens=tokens_per_step * recipe.steps,
        flops_per_token=flops_per_token,
        flops=flops,
        a100_days=flops / (PEAK_FLOPS["A100"] * UTILISATION) / 86_400,
        memory={
            kind: estimate_training_memory(
                recipe, config, micro, devices if sharded else 1
            )
            for kind, sharded in (("ddp", False), ("fsdp", True))
        },
        missing=tuple(missing),
    )


def share_batch(recipe: PretrainRecipe, devices: int) -> int:
    """Return the sequences of one process.

    Raises:
        OpenELMError: the processes do not divide the batch, or micro-batches do not
            divide a process's share.
    """
    share, rest = divmod(recipe.batch_size, devices)
    if rest or share < 1:
        raise OpenELMError(
            f"batch_size {recipe.batch_size} cannot be shared by {devices} "
            "processes; make it a multiple."
        )
    micro = recipe.micro_batch_size
    if micro is not None and share > micro and share % micro:
        raise OpenELMError(
            f"micro_batch_size {micro} does not divide the {share} sequences of each "
            f"of {devices} processes; choose one that does."
        )
    return share


def count_flops_per_token(config: OpenELMConfig, context: int) -> float:
    """Return the FLOPs of one training token (forward and backward).

    6 per parameter of the matrices (the tied head included, the lookup not), plus
    12 L Q H S / 2 of causal attention on average (Kaplan et al., arXiv 2001.08361).
    """
    shapes = config.tensor_shapes().values()
    matrices = sum(math.prod(s) for s in shapes if len(s) == 2)
    if not config.share_input_output_layers:
        matrices -= config.vocab_size * config.model_dim
    attention = sum(config.num_query_heads) * config.head_dim * context / 2
    return 6.0 * matrices + 12.0 * attention


def find_peak_flops(device_name: str) -> float | None:
    """Return a device's peak in bfloat16 by torch's name of it; None: not known."""
    known = (flops for part, flops in PEAK_FLOPS.items() if part in device_name)
    return next(known, None)


# Memory ------------------------------------------------------------------------------


def estimate_training_memory(
    recipe: PretrainRecipe, config: OpenELMConfig, micro: int, shards: int
) -> Memory:
    """Reckon one device's bytes, with P parameters and b bytes a computed number.

    Weights, gradients 4P each; optimizer 8P (Muon's matrices 4), all over `shards`;
    copies 2P under autocast; of shards the embedding and two blocks, b each, and a
    block's gradients. Activations: see `count_layer_bytes`; checkpointed, the inputs
    of the blocks and the largest block's own; and (12 + b) bytes a logit.
    """
    P = config.num_parameters
    shapes = config.tensor_shapes()
    blocks = [
        sum(math.prod(s) for n, s in shapes.items() if n.startswith(f"layers.{i}."))
        for i in range(config.num_transformer_layers)
    ]
    hidden = sum(
        math.prod(s)
        for n, s in shapes.items()
        if n.startswith("layers.") and len(s) == 2
    )
    b = 2 if recipe.bf16 else 4
    if shards > 1:
        copies = b * (P - sum(blocks)) + (2 * b + 4) * max(blocks)
    else:
        copies = 2 * P if recipe.bf16 else 0
    layers = [
        count_layer_bytes(config, i, bf16=recipe.bf16)
        for i in range(config.num_transformer_layers)
    ]
    if recipe.activation_checkpointing:
        in_layers = 4 * config.model_dim * len(layers) + max(layers)
    else:
        in_layers = sum(layers)
    positions = micro * config.max_context_length
    saved_by_muon = 4 * hidden if recipe.optimizer.name == "muon" else 0
    return Memory(
        weights=4 * P // shards,
        gradients=4 * P // shards,
        optimizer=(8 * P - saved_by_muon) // shards,
        copies=copies,
        activations=positions * (in_layers + (12 + b) * config.vocab_size),
    )


def count_layer_bytes(config: OpenELMConfig, layer: int, *, bf16: bool) -> int:
    """Return what the gradient of a layer needs, in bytes a position.

    Two norms keep their input, its normed form and what the next matrix reads; queries
    and keys the same, and attention its operands and its outcome; the FFN its two
    halves, the gate's activation and the product. Norms compute in float32.
    """
    D, F = config.model_dim, config.ffn_dims[layer]
    QH = config.num_query_heads[layer] * config.head_dim
    KH = config.num_kv_heads[layer] * config.head_dim
    if bf16:
        return 20 * D + 16 * QH + 6 * KH + 8 * F
    return 24 * D + 28 * QH + 12 * KH + 16 * F


# What there is -----------------------------------------------------------------------


def _size_up(recipe: PretrainRecipe, missing: list[str]) -> OpenELMConfig:
    if recipe.init is not None:
        init = Path(recipe.init)
        if not init.is_file():
            missing.append(f"The recipe's init, {init}, is no file.")
        return OpenELMConfig.from_file(init.parent / "config.json")
    path = recipe.tokenizer.path
    if path is None:
        return recipe.model.build(recipe.tokenizer.vocab_size)
    if not Path(path).is_file():
        missing.append(
            f"The tokenizer, {path}, is no file; reckoned with Llama's {LLAMA_PIECES} "
            "pieces."
        )
        return recipe.model.build(LLAMA_PIECES)
    return recipe.model.build(Tokenizer.from_file(Path(path)).vocab_size)


def _missing_text(recipe: PretrainRecipe) -> list[str]:
    data = recipe.data
    sets = [corpus.files for corpus in data.corpora] or [data.train]
    if not any(sets):
        return ["The recipe names no text: set data.train, or say `data`."]
    missing = []
    for patterns in (*sets, *([data.heldout] if data.heldout else [])):
        try:
            find_files(patterns)
        except OpenELMError as error:
            missing.append(str(error))
    return missing
