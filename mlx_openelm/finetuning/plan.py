"""What a run will take, before it starts: steps, trained weights, memory.

The memory is reckoned from the real lengths of the batches and the widths of the
layers. Letters as in `model.openelm`; N tokens of one batch, M of them in the loss.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_openelm.finetuning.batches import plan_epoch, share_out
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.model.chunk_sizes import QUERIES, training_logit_rows
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.training.arrays import flatten, trained_tensors

# Copies of the trained weights, in float32, that an optimizer keeps.
_OPTIMIZER_COPIES = {"adamw": 2, "adam": 2, "sgd": 1, "lion": 1, "muon": 1}
_SCORES = 6  # copies of a block of attention's scores, in the gradient
_OVERHEAD = 1.1  # for what is freed a moment later than it could be


class Order:
    """Which samples each step takes: the same for the same recipe and data.

    Attributes:
        steps: updates in the run.
        epochs: how often they take all samples; for packed rows about.
    """

    def __init__(self, lengths: Sequence[int], recipe: FinetuneRecipe) -> None:
        self._lengths, self._recipe = lengths, recipe
        self._starts = [0]  # the first step of each epoch that is known
        self._planned = -1, list[tuple[int, ...]]()
        if recipe.iters is not None:
            self.steps = recipe.iters
            self.epochs = recipe.iters / len(self._plan(0))
        else:
            self.epochs = recipe.epochs or 0.0
            whole = math.floor(self.epochs)
            part = self.epochs - whole
            rest = round(part * len(self._plan(whole))) if part else 0
            self.steps = max(1, self._start(whole) + rest)

    def batch(self, step: int) -> tuple[int, ...]:
        """Return the samples of the update after `step` others."""
        epoch = self._epoch(step)
        return self._plan(epoch)[step - self._start(epoch)]

    def epoch_after(self, step: int) -> float:
        """Return how often all samples were taken after `step` updates."""
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
            if self._recipe.pack:  # how many rows are filled is seen when they are
                count = len(self._plan(len(self._starts) - 1))
            self._starts.append(self._starts[-1] + count)
        return self._starts[epoch]

    def _plan(self, epoch: int) -> list[tuple[int, ...]]:
        """Return an epoch's batches; the last one that was asked for is kept."""
        if self._planned[0] != epoch:
            recipe = self._recipe
            batches = plan_epoch(
                self._lengths,
                recipe.step_size,
                seed=recipe.seed,
                epoch=epoch,
                pack_length=recipe.max_seq_length if recipe.pack else None,
            )
            self._planned = epoch, batches
        return self._planned[1]


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What the memory of one forward and backward pass depends on.

    Attributes:
        tokens: N, of all its sequences.
        targets: M, tokens that count.
        longest: tokens of its longest sequence.
    """

    tokens: int
    targets: int
    longest: int


def largest_batch(
    order: Order, lengths: Sequence[int], targets: Sequence[int], parts: int
) -> BatchShape:
    """Return the largest share of a step, in the run or in its first 1000 steps.

    Args:
        lengths, targets: of each sample, in tokens.
        parts: into which each step is shared out.
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
    """Bytes at the moment when most are in use, by what they are for.

    Attributes:
        loss: what its logits take beyond the room of a block's work.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(dataclasses.asdict(self).values())


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A run before its start.

    Attributes:
        trainable, parameters: numbers of weights.
        tokens: that the run reads, about; `targets` of them count in the loss.
        limit: bytes that this machine should stay below.
        smaller: settings that take less memory, each with the bytes that it takes.
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
    """Reckon the memory of a run.

    Args:
        model: as it will be trained, adapter included; nothing of it is computed.
    """
    adapter = 4 * sum(array.size for array in trained_tensors(model).values())
    kept, work = _activation_bytes(model, recipe, batch)
    return MemoryPlan(
        weights=count_bytes(model) - adapter,
        adapter=adapter,
        # Those of a share, and their sum over shares. The update itself comes when the
        # activations are gone.
        gradients=adapter * (1 + (recipe.grad_accumulation_steps > 1)),
        optimizer=int(_OPTIMIZER_COPIES.get(recipe.optimizer, 0.1) * adapter),
        activations=int(_OVERHEAD * (kept + work)),
        # Its own work is done when that of the blocks begins.
        loss=max(0, _loss_bytes(model, recipe, batch) - work),
    )


def count_bytes(model: OpenELM) -> int:
    """Return the bytes of all weights, adapter included."""
    return sum(array.nbytes for array in flatten(model.parameters()).values())


def _activation_bytes(
    model: OpenELM, recipe: FinetuneRecipe, batch: BatchShape
) -> tuple[int, int]:
    """What the blocks keep for their gradients, and the widest block's own work."""
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
        # stream, normed copies; q, k, v as projected, normed, rotated; attended twice;
        # gate and up; their product.
        row = 4 * D + 3 * heads + 2 * Q * H + 3 * F
        row += dropout * (2 * D + Q * H + F)  # what the adapters see
        row += dora * (2 * D + heads + 2 * F)  # before m
        kept.append(N * row * size)
        scores = _SCORES * Q * min(QUERIES, T) * T * 4
        widest = max(widest, N * (2 * heads + 5 * F) * size + scores)
    if recipe.grad_checkpoint:  # a block is computed again while the last one's goes
        return len(kept) * N * D * size, 2 * max(kept) + widest
    return sum(kept), widest


def _first_trained_block(model: OpenELM) -> int:
    """Return the block where gradients end; what stands below it keeps nothing."""
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
    """Logits and their powers, and each counted row with its gradient."""
    V, D, M = model.config.vocab_size, model.config.model_dim, batch.targets
    # Three chunks, for MLX begins the next ones while one is computed.
    logits = min(3 * training_logit_rows(V), M) * V * 4
    head = V * D * 4 * (_compute_size(model) != 4)  # widened to float32
    if recipe.fine_tune_type == "full":  # the head's gradient, from the logits' own
        head += V * D * 4 + logits
    return 2 * logits + 3 * M * D * 4 + head


def _compute_size(model: OpenELM) -> int:
    """Bytes of an activation: the norms have the dtype that is computed in."""
    return model.transformer.norm.weight.dtype.size


def propose_smaller(
    recipe: FinetuneRecipe, shortest_useful: int = 128
) -> list[tuple[str, FinetuneRecipe]]:
    """Return recipes that need less memory, the mildest first, each with its flags."""
    found: list[tuple[str, FinetuneRecipe]] = []
    flags: dict[str, str] = {}

    def add(option: str, flag: str, **changes: Any) -> None:
        nonlocal recipe
        recipe = dataclasses.replace(recipe, **changes)
        flags[option] = flag
        found.append((" ".join(flags.values()), recipe))

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
    return found
