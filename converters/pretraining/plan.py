"""Estimate of a run's steps, tokens, memory and FLOPs, from its recipe."""

import math
from dataclasses import dataclass
from pathlib import Path

from converters.formats.checkpoint_weights import find_config
from converters.pretraining.corpus_files import find_files
from converters.pretraining.model_sources import open_model
from converters.pretraining.recipe import PretrainRecipe, list_corpora
from mlx_openelm.compatibility import describe_closed
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
UTILISATION = 0.4  # of an A100's peak, assumed for `a100_days`


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device; `total` is the least that it needs.

    Attributes:
        copies: weights in the compute dtype; for a sharded model, its unsharded parts.
        activations: peak, including the logits.
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
    """Estimated sizes of a run.

    Attributes:
        devices: number of devices; each runs `accumulation` passes of
            `micro_batch_size` sequences per step.
        tokens_per_step: positions of the batch, padding included.
        a100_days: on one A100 at `UTILISATION` of its peak.
        memory: per device, with "ddp" and "fsdp".
        missing: a sentence on each missing input.
        closed: a sentence on the tools that do not open the shape; empty if all do.
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
    closed: str


def plan_pretraining(
    recipe: PretrainRecipe, *, devices: int | None = None
) -> PretrainingPlan:
    """Estimate a run, whose text may be missing.

    Args:
        devices: default: enough for a step without accumulation.

    Raises:
        OpenELMError: `devices` does not divide the batch, or the recipe is invalid.
    """
    missing: list[str] = []
    config = _find_config(recipe, missing)
    missing += _missing_text(recipe)
    micro = recipe.micro_batch_size or recipe.batch_size
    if devices is None:
        devices = math.gcd(max(1, recipe.batch_size // micro), recipe.readers)
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
        closed=describe_closed(config),
    )


def share_batch(recipe: PretrainRecipe, devices: int) -> int:
    """Return the number of sequences of one process.

    Raises:
        OpenELMError: `devices` does not divide the batch or the readers, or
            `micro_batch_size` does not divide a process's share.
    """
    share, rest = divmod(recipe.batch_size, devices)
    if rest or share < 1:
        raise OpenELMError(
            f"batch_size is {recipe.batch_size}; it must be a multiple of the number "
            f"of processes ({devices})."
        )
    if not recipe.data.packing:
        check_readers(recipe.readers, devices)
    micro = recipe.micro_batch_size
    if micro is not None and share > micro and share % micro:
        raise OpenELMError(
            f"micro_batch_size is {micro}; it must divide the {share} sequences of "
            f"each of the {devices} processes."
        )
    return share


def check_readers(readers: int, processes: int) -> None:
    """Raise OpenELMError if processes cannot have the same number of readers."""
    if readers % processes:
        raise OpenELMError(
            f"data.readers is {readers}; it must be a multiple of the number of "
            f"processes ({processes})."
        )


def count_flops_per_token(config: OpenELMConfig, context: int) -> float:
    """Return the FLOPs per training token (forward and backward).

    6 per parameter of the matrices (including the tied head, without the lookup), plus
    12 L Q H S / 2 for causal attention (Kaplan et al., arXiv 2001.08361).
    """
    shapes = config.tensor_shapes().values()
    matrices = sum(math.prod(s) for s in shapes if len(s) == 2)
    if not config.share_input_output_layers:
        matrices -= config.vocab_size * config.model_dim
    attention = sum(config.num_query_heads) * config.head_dim * context / 2
    return 6.0 * matrices + 12.0 * attention


def find_peak_flops(device_name: str) -> float | None:
    """Return the bfloat16 peak of a device by its name in torch; None if unknown."""
    matching = (flops for part, flops in PEAK_FLOPS.items() if part in device_name)
    return next(matching, None)


# Memory ------------------------------------------------------------------------------


def estimate_training_memory(
    recipe: PretrainRecipe, config: OpenELMConfig, micro: int, shards: int
) -> Memory:
    """Estimate the bytes on one device, for P parameters and b bytes per activation.

    Weights and gradients: 4P each; optimizer: 8P (4 per parameter of Muon); all divided
    by `shards`. Copies: 2P with autocast; with shards, b per parameter of the embedding
    and of two blocks, and a block's gradients. Activations: see `count_layer_bytes`;
    with checkpointing, the inputs of the blocks and all of the largest block; plus
    12 + b per logit.
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
    """Return the bytes per position that a layer saves for its backward pass.

    Saved are, for both norms and for those of queries and keys: the input, the
    normalised input and the output; for attention: operands and output; for the FFN:
    both halves, the gate's activation and the product. Norms compute in float32.
    """
    D, F = config.model_dim, config.ffn_dims[layer]
    QH = config.num_query_heads[layer] * config.head_dim
    KH = config.num_kv_heads[layer] * config.head_dim
    if bf16:
        return 20 * D + 16 * QH + 6 * KH + 8 * F
    return 24 * D + 28 * QH + 12 * KH + 16 * F


# Config and missing inputs -----------------------------------------------------------


def _find_config(recipe: PretrainRecipe, missing: list[str]) -> OpenELMConfig:
    if recipe.init is not None:
        init = Path(recipe.init)
        config_path = None if init.is_dir() else find_config(init)
        if config_path is None:  # the sizes of its tensors
            return open_model(recipe.init).config
        if not init.is_file():
            missing.append(f"The recipe's init, {init}, is not a file.")
        return OpenELMConfig.from_file(config_path)
    path = recipe.tokenizer.path
    if path is None:
        return recipe.model.build(recipe.tokenizer.vocab_size)
    if not Path(path).is_file():
        missing.append(
            f"The tokenizer, {path}, is not a file; estimated for Llama's "
            f"{LLAMA_PIECES} pieces."
        )
        return recipe.model.build(LLAMA_PIECES)
    return recipe.model.build(Tokenizer.from_file(Path(path)).vocab_size)


def _missing_text(recipe: PretrainRecipe) -> list[str]:
    data = recipe.data
    if not data.train and not data.corpora:
        return ["The recipe has no text: set data.train, or pass `data`."]
    sets = [(corpus.name, corpus.files) for corpus in list_corpora(data)]
    missing = []
    for name, patterns in (*sets, *([("", data.heldout)] if data.heldout else [])):
        try:
            find_files(patterns)
        except OpenELMError as error:
            missing.append(f"{name}: {error}" if name else str(error))
    return missing
