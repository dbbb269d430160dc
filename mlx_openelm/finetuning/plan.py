"""The plan of a run before its start: order of samples, steps, weights and memory.

Memory is estimated from the actual batch lengths and the layer widths. Letters as in
`model.openelm`; a batch has N tokens, M of them targets.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_openelm.device import takes_gpu_path
from mlx_openelm.finetuning.batches import (
    MULTIPLE,
    choose_multiple,
    plan_epoch,
    round_up,
    share_out,
)
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.model.chunk_sizes import (
    QUERIES,
    SCORES_AT_ONCE,
    fused_logit_rows,
    training_logit_rows,
)
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.training.arrays import flatten, trained_tensors

# Copies of the trained weights in the optimizer state, float32.
_OPTIMIZER_COPIES = {"adamw": 2, "adam": 2, "sgd": 1, "lion": 1, "muon": 1}
_SCORES = 6  # copies of a block of attention scores in the backward pass
_OVERHEAD = 1.1  # some memory is freed later than possible


class Order:
    """The samples of each step, determined by recipe and data.

    Attributes:
        steps: number of updates in the run.
        epochs: passes over the data in these steps; with packing, approximate.
    """

    def __init__(self, lengths: Sequence[int], recipe: FinetuneRecipe) -> None:
        self._lengths, self._recipe = lengths, recipe
        self._starts = [0]  # first step of each epoch, as far as computed
        self._cached_plan = -1, list[tuple[int, ...]]()  # epoch, its batches
        if recipe.iters is not None:
            self.steps = recipe.iters
            self.epochs = recipe.iters / len(self._plan(0))
        else:
            self.epochs = recipe.epochs or 0.0
            whole = math.floor(self.epochs)
            fraction = self.epochs - whole
            rest = round(fraction * len(self._plan(whole))) if fraction else 0
            self.steps = max(1, self._start(whole) + rest)

    def batch(self, step: int) -> tuple[int, ...]:
        """Return the sample indices of update number `step`, counted from 0."""
        epoch = self._epoch(step)
        return self._plan(epoch)[step - self._start(epoch)]

    def epoch_after(self, step: int) -> float:
        """Return the passes over the data after `step` updates."""
        epoch = self._epoch(step)
        start = self._start(epoch)
        return epoch + (step - start) / (self._start(epoch + 1) - start)

    def _epoch(self, step: int) -> int:
        while self._starts[-1] <= step:
            self._start(len(self._starts))
        return bisect.bisect_right(self._starts, step) - 1

    def _start(self, epoch: int) -> int:
        """Return the first step of an epoch."""
        while len(self._starts) <= epoch:
            count = math.ceil(len(self._lengths) / self._recipe.step_size)
            if self._recipe.pack:  # the number of rows depends on the packing
                count = len(self._plan(len(self._starts) - 1))
            self._starts.append(self._starts[-1] + count)
        return self._starts[epoch]

    def _plan(self, epoch: int) -> list[tuple[int, ...]]:
        """Return the batches of an epoch; the last result is cached."""
        if self._cached_plan[0] != epoch:
            recipe = self._recipe
            batches = plan_epoch(
                self._lengths,
                recipe.step_size,
                seed=recipe.seed,
                epoch=epoch,
                pack_length=recipe.max_seq_length if recipe.pack else None,
            )
            self._cached_plan = epoch, batches
        return self._cached_plan[1]


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The sizes of a batch that determine its memory.

    Attributes:
        tokens: N, input tokens of all sequences.
        targets: M, target tokens.
        longest: tokens of the longest sequence.
        slots: for attention on a GPU; 0 if the batch is not padded.
    """

    tokens: int
    targets: int
    longest: int
    slots: int = 0


def largest_batch(
    order: Order, lengths: Sequence[int], targets: Sequence[int], parts: int
) -> BatchShape:
    """Return the shape of the largest micro-batch in the first 1000 steps.

    Args:
        lengths, targets: number of tokens and of targets of each sample.
        parts: number of micro-batches of a step, over all processes.
    """
    largest = BatchShape(1, 1, 1)
    for step in range(min(order.steps, 1000)):
        for share in share_out(order.batch(step), lengths, parts):
            tokens = sum(lengths[i] for i in share)
            if tokens > largest.tokens:
                longest = max(lengths[i] for i in share)
                largest = BatchShape(tokens, sum(targets[i] for i in share), longest)
    return largest


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Estimated peak memory of a step, in bytes.

    Attributes:
        loss: memory of the logits beyond the temporary memory of a block.
        teacher: weights of a teacher in memory.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    teacher: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.asdict(self).values())


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """The size of a run: steps, weights, tokens and memory.

    Attributes:
        trainable, parameters: numbers of trained weights and of all weights.
        tokens, targets: approximate numbers of tokens and targets in the run.
        limit: memory limit, in bytes.
        smaller: settings that need less memory, each with its estimate in bytes.
    """

    steps: int
    epochs: float
    trainable: int
    parameters: int
    tokens: int
    targets: int
    memory: MemoryPlan
    limit: int
    smaller: tuple[tuple[str, int], ...]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit


def plan_memory(
    model: OpenELM, recipe: FinetuneRecipe, batch: BatchShape
) -> MemoryPlan:
    """Estimate the peak memory of a run.

    Args:
        model: the model with its adapter; its weights can be lazy.
        batch: the largest micro-batch.
    """
    adapter = 4 * sum(array.size for array in trained_tensors(model).values())
    if takes_gpu_path():
        batch = _pad(batch)
    kept, work = _activation_bytes(model, recipe, batch)
    return MemoryPlan(
        weights=count_bytes(model) - adapter,
        adapter=adapter,
        # Of one micro-batch, plus their sum. The update follows when the activations
        # are freed.
        gradients=adapter * (1 + (recipe.grad_accumulation_steps > 1)),
        optimizer=int(_OPTIMIZER_COPIES.get(recipe.optimizer, 0.1) * adapter),
        activations=int(_OVERHEAD * (kept + work)),
        # The temporary memory of the loss is freed before that of the blocks is used.
        loss=max(0, _loss_bytes(model, recipe, batch) - work),
    )


def _pad(batch: BatchShape) -> BatchShape:
    """Return the sizes of a batch that is padded for a compiled update."""
    N = round_up(batch.tokens + 1, choose_multiple(batch.tokens + 1))
    M, S = (round_up(count, MULTIPLE) for count in (batch.targets, batch.longest))
    rows = math.ceil(batch.tokens / batch.longest)
    return BatchShape(N, M, S, max(N, rows * S))


def count_bytes(model: OpenELM) -> int:
    """Return the bytes of all weights, with the adapter."""
    return sum(array.nbytes for array in flatten(model.parameters()).values())


def _activation_bytes(
    model: OpenELM, recipe: FinetuneRecipe, batch: BatchShape
) -> tuple[int, int]:
    """Return the bytes of saved activations, and of the widest block's temporaries."""
    config = model.config
    D, H, N, T = config.model_dim, config.head_dim, batch.tokens, batch.longest
    size = _compute_size(model)
    dropout, dora = recipe.dropout > 0, recipe.fine_tune_type == "dora"
    kept, widest = [0], 0
    L = config.num_transformer_layers
    for i in range(_first_trained_block(model), L):
        Q, K = config.num_query_heads[i], config.num_kv_heads[i]
        F = config.ffn_dims[i]
        heads = (Q + 2 * K) * H
        # Residual stream and normalised copies; q, k, v projected, normalised, rotated;
        # attention output twice; gate, up and their product.
        row = 4 * D + 3 * heads + 2 * Q * H + 3 * F
        row += dropout * (2 * D + Q * H + F)  # adapter inputs after dropout
        row += dora * (2 * D + heads + 2 * F)  # outputs before the magnitude
        if batch.slots:  # heads in slots, scaled queries, factors of SwiGLU
            row += 2 * F - heads - Q * H
        kept.append((N * row + batch.slots * (heads + Q * H)) * size)
        kept_scores, scores = _count_scores(Q, batch.slots or N, T)
        kept[-1] += kept_scores * size
        scores *= _SCORES * (size if takes_gpu_path() else 4)
        widest = max(widest, N * (2 * heads + 5 * F) * size + scores)
    if recipe.grad_checkpoint:  # two blocks overlap: one is freed, one recomputed
        return len(kept) * N * D * size, 2 * max(kept) + widest
    return sum(kept), widest


def _count_scores(Q: int, N: int, T: int) -> tuple[int, int]:
    """Return the attention scores of a block that are saved, and that exist at once.

    On a GPU those of small batches are saved; see `PaddedSequences`.
    """
    if not takes_gpu_path():
        return 0, Q * min(QUERIES, T) * T
    scores = Q * N * T
    if scores <= SCORES_AT_ONCE:
        return scores, scores
    return 0, max(SCORES_AT_ONCE, Q * T * T)


def _first_trained_block(model: OpenELM) -> int:
    """Return the first block with trained weights; blocks below save no activations."""
    L = model.config.num_transformer_layers
    blocks = [L]
    for name in trained_tensors(model):
        path = name.split(".")
        if "layers" in path:
            blocks.append(int(path[path.index("layers") + 1]))
        elif "token_embeddings" in path:
            blocks.append(0)
    return min(blocks)


def _loss_bytes(model: OpenELM, recipe: FinetuneRecipe, batch: BatchShape) -> int:
    """Return the bytes of logits, probabilities, target rows and their gradients."""
    V, D, M = model.config.vocab_size, model.config.model_dim, batch.targets
    # Three chunks: MLX starts the next ones while one is computed.
    logits = min(3 * training_logit_rows(V), M) * V * 4
    head = V * D * 4 * (_compute_size(model) != 4)  # widened to float32
    if takes_gpu_path():
        logits = min(2 * fused_logit_rows(V), M) * V * _compute_size(model)
        head = 0
    if recipe.fine_tune_type == "full":  # gradients of head and logits
        head += V * D * 4 + logits
    return 2 * logits + 3 * M * D * 4 + head


def _compute_size(model: OpenELM) -> int:
    """Return the bytes of an activation; norms are in the compute dtype."""
    return model.transformer.norm.weight.dtype.size


def propose_smaller(
    recipe: FinetuneRecipe, shortest_useful: int = 128
) -> list[tuple[str, FinetuneRecipe]]:
    """Return (settings, recipe) pairs that need less and less memory."""
    proposals: list[tuple[str, FinetuneRecipe]] = []
    settings: dict[str, str] = {}

    def add(name: str, setting: str, **changes: Any) -> None:
        nonlocal recipe
        recipe = dataclasses.replace(recipe, **changes)
        settings[name] = setting
        proposals.append((" ".join(settings.values()), recipe))

    if not recipe.grad_checkpoint:
        add("activations", "`grad_checkpoint`", grad_checkpoint=True)
    while recipe.batch_size % 2 == 0:
        size, steps = recipe.batch_size // 2, recipe.grad_accumulation_steps * 2
        add(
            "batch",
            f"`batch_size` {size} `grad_accumulation_steps` {steps}",
            batch_size=size,
            grad_accumulation_steps=steps,
        )
    while (longest := (recipe.max_seq_length or 0) // 2) >= shortest_useful:
        add(
            "length",
            f"`max_seq_length` {longest}",
            max_seq_length=longest,
            max_prompt_length=min(recipe.max_prompt_length or longest, longest // 2),
        )
    return proposals
