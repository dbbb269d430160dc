"""Trainable weights: choice of modules and ranks, initialisation, dropout keys."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.refinements.noise import EmbeddingNoise
from mlx_openelm.message_parts import count_of
from mlx_openelm.model.lora import (
    A_NAMES,
    B_NAMES,
    DoRALinear,
    InputLoRAEmbedding,
    LoRAEmbedding,
    LoRALinear,
    row_lengths,
)
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.training.arrays import trained_tensors

Method = Literal["lora", "dora", "full"]

_LINEARS = nn.Linear | nn.QuantizedLinear
_EMBEDDINGS = nn.Embedding | nn.QuantizedEmbedding
_INITIALISATION, _DROPOUT, _NOISE = 1, 2, 3  # uses of random numbers
_PACKED = nn.QuantizedLinear | nn.QuantizedEmbedding

EMBEDDING = "transformer.token_embeddings"


def choose_modules(
    model: OpenELM,
    *,
    num_layers: int = -1,
    keys: Sequence[str] = (),
    embedding: bool = False,
) -> dict[str, nn.Module]:
    """Return the modules to adapt, by path in the model.

    Args:
        num_layers: number of last blocks to adapt; -1 for all.
        keys: paths in a block ("attn.qkv_proj"), their last part ("qkv_proj"), or paths
            in the model ("transformer.token_embeddings"). Default: all linear layers
            of the blocks.
        embedding: also choose the embedding.

    Raises:
        OpenELMError: the model has fewer blocks, or a key matches no module.
    """
    if embedding and EMBEDDING in keys:
        raise OpenELMError(
            f"`adapt_embedding` adapts the embedding without its tied head, and `keys` "
            f"{EMBEDDING} with it; use one of them."
        )
    L = len(model.layers)
    if num_layers != -1 and not 1 <= num_layers <= L:
        raise OpenELMError(
            f"`num_layers` is {num_layers}, but the model has {count_of(L, 'layer')}; "
            f"use 1 to {L}, or -1 for all."
        )
    first = 0 if num_layers == -1 else L - num_layers
    in_blocks = {
        f"transformer.layers.{i}.{path}": path
        for i in range(first, L)
        for path, module in model.layers[i].named_modules()
        if isinstance(module, _LINEARS)
    }
    outside = [
        path
        for path, module in model.named_modules()
        if isinstance(module, _LINEARS | _EMBEDDINGS) and ".layers." not in path
    ]
    chosen: dict[str, None] = {} if keys else dict.fromkeys(in_blocks)
    if embedding:
        chosen[EMBEDDING] = None
    for key in keys:
        matches = [
            path
            for path, inside in in_blocks.items()
            if key in (path, inside, inside.rpartition(".")[2])
        ] + [path for path in outside if key == path]
        if not matches:
            candidates = ", ".join([*sorted(set(in_blocks.values())), *outside])
            raise OpenELMError(
                f"`keys` has {key!r}, which is not a module; choose from {candidates}."
            )
        chosen |= dict.fromkeys(matches)
    modules = dict(model.named_modules())
    return {path: modules[path] for path in modules if path in chosen}


def choose_ranks(
    modules: Mapping[str, nn.Module], rank: int, *, by_width: bool = False
) -> dict[str, int]:
    """Return a rank for each module.

    Args:
        by_width: choose ranks in proportion to the sum of inputs and outputs of each
            module, with the mean `rank`.

    Raises:
        OpenELMError: a rank is larger than its matrix allows.
    """
    widths = {path: sum(weight_shape(module)) for path, module in modules.items()}
    ranks = dict.fromkeys(modules, rank)
    if by_width:
        total, all_widths = rank * len(modules), sum(widths.values())
        exact = {path: total * width / all_widths for path, width in widths.items()}
        ranks = {path: max(1, math.floor(value)) for path, value in exact.items()}
        # Largest remainders first, so that the sum of the ranks is exact.
        by_rest = sorted(exact, key=lambda path: math.floor(exact[path]) - exact[path])
        for path in by_rest[: max(0, total - sum(ranks.values()))]:
            ranks[path] += 1
    for path, module in modules.items():
        limit = min(weight_shape(module))
        if ranks[path] > limit:
            raise OpenELMError(
                f"Rank {ranks[path]} is too large for {path}, which is "
                f"{' by '.join(map(str, weight_shape(module)))}; use a `rank` of 1 to "
                f"{limit}."
            )
    return ranks


def adapt(
    model: OpenELM,
    method: Method,
    ranks: Mapping[str, int],
    *,
    scale: float,
    dropout: float = 0.0,
    seed: int = 0,
    inputs_only: bool = False,
) -> None:
    """Freeze the model and add LoRA or DoRA to the modules in `ranks`.

    A is uniform within 1 / sqrt(I) (Kaiming, as in mlx-lm and CoreNet), B is zero, and
    m is the norm of each row of the base: the output of the model does not change.

    Args:
        inputs_only: LoRA of the embedding does not change a tied head. A is zero and B
            normal then, as in CoreNet and PEFT.

    Raises:
        OpenELMError: DoRA for an embedding, which no other tool supports.
    """
    model.freeze()
    modules = dict(model.named_modules())
    wrapped: list[tuple[str, nn.Module]] = []
    for i, (path, rank) in enumerate(ranks.items()):
        module, key = modules[path], random_key(seed, _INITIALISATION, i)
        rows, width = weight_shape(module)
        adapter: nn.Module
        if isinstance(module, _EMBEDDINGS) and inputs_only:
            lora_a, lora_b = (
                mx.zeros((rows, rank)),
                mx.random.normal((rank, width), key=key),
            )
            # mlx-lm's layer is the same if the head is untied and the method LoRA.
            shared = method == "lora" and not model.config.share_input_output_layers
            layer = LoRAEmbedding if shared else InputLoRAEmbedding
            adapter = layer(module, lora_a, lora_b, scale)
        elif isinstance(module, _EMBEDDINGS):
            if method == "dora":
                raise OpenELMError(
                    f"DoRA cannot adapt {path}; leave it out of `keys`, or use "
                    "`fine_tune_type` lora."
                )
            bound = 1 / math.sqrt(rows)
            lora_a = mx.random.uniform(-bound, bound, (rows, rank), key=key)
            adapter = LoRAEmbedding(module, lora_a, mx.zeros((rank, width)), scale)
        else:
            bound = 1 / math.sqrt(width)
            lora_a = mx.random.uniform(-bound, bound, (width, rank), key=key)
            lora_b = mx.zeros((rank, rows))
            if method == "dora":
                lengths = row_lengths(module)
                adapter = DoRALinear(module, lora_a, lora_b, scale, lengths, dropout)
            else:
                adapter = LoRALinear(module, lora_a, lora_b, scale, dropout)
        adapter.freeze()
        adapter.unfreeze(keys=[*A_NAMES, *B_NAMES, "m"], recurse=False)
        wrapped.append((path, adapter))
    model.update_modules(tree_unflatten(wrapped))
    mx.eval(model.trainable_parameters())


def unfreeze(model: OpenELM, *, num_layers: int = -1) -> None:
    """Make the model itself trainable: all of it, or its last `num_layers` blocks.

    Raises:
        OpenELMError: the model is quantized, or has fewer blocks.
    """
    packed = [p for p, m in model.named_modules() if isinstance(m, _PACKED)]
    if packed:
        raise OpenELMError(
            f"{packed[0]} is quantized, and quantized weights cannot be trained; "
            "use `fine_tune_type` lora, or convert the model with `dequantize`."
        )
    choose_modules(model, num_layers=num_layers)  # checks the number
    model.freeze()
    if num_layers == -1:
        model.unfreeze()
    else:
        for layer in model.layers[-num_layers:]:
            layer.unfreeze()


def adapter_tensors(model: OpenELM) -> dict[str, mx.array]:
    """Return the trained tensors in mlx-lm's format: ranks are padded with zeros."""
    tensors = trained_tensors(model)
    rank = max(
        (a.shape[-1] for n, a in tensors.items() if _leaf(n) in A_NAMES), default=0
    )
    axes = dict.fromkeys(A_NAMES, 1) | dict.fromkeys(B_NAMES, 0)
    for name, array in tensors.items():
        axis = axes.get(_leaf(name))
        if axis is not None and array.shape[axis] < rank:
            padding = [(0, 0), (0, 0)]
            padding[axis] = (0, rank - array.shape[axis])
            tensors[name] = mx.pad(array, padding)
    return tensors


def random_key(*numbers: int) -> mx.array:
    """Return a random key that is determined by the numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return mx.random.key(int(state[0]))


def use_dropout(model: OpenELM, *numbers: int) -> None:
    """Set the keys of dropout and of noise; without numbers, turn both off."""
    key = random_key(_DROPOUT, *numbers) if numbers else None
    if isinstance(noise := model.transformer.noise, EmbeddingNoise):
        noise.use_key(random_key(_NOISE, *numbers) if numbers else None)
    adapters = [m for m in model.modules() if isinstance(m, LoRALinear)]
    keys = (
        [None] * len(adapters) if key is None else mx.random.split(key, len(adapters))
    )
    for adapter, adapter_key in zip(adapters, keys, strict=True):
        adapter.use_key(adapter_key)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """Return the shape of the unpacked weight of a linear layer or embedding."""
    rows, width = module.weight.shape
    return rows, width * 32 // module.bits if isinstance(module, _PACKED) else width


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
