"""Small training runs for tests that call single steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from models import UNEVEN, build

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.finetuning import records
from mlx_openelm.finetuning.compiled.choice import chooses_compiled
from mlx_openelm.finetuning.further_objectives.choice import make_objective
from mlx_openelm.finetuning.plan import Order, largest_batch, plan_memory
from mlx_openelm.finetuning.preparation import make_trainable
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.records import Data
from mlx_openelm.finetuning.run_context import RunContext
from mlx_openelm.finetuning.run_saver import RunSaver
from mlx_openelm.finetuning.samples import Pair, Sample, Samples, lengths_of, targets_of
from mlx_openelm.finetuning.trainer import Trainer
from mlx_openelm.finetuning.validation import Validator
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.signals import Stop
from mlx_openelm.training.arrays import flatten, trained_tensors
from mlx_openelm.training.distributed import World
from mlx_openelm.training.events import EventLog
from mlx_openelm.training.optimizer import make_optimizer
from mlx_openelm.training.state import TrainingProgress, TrainingState
from mlx_openelm.tuning import DEFAULT

UNTIED = replace(UNEVEN, share_input_output_layers=False)
LENGTHS = (5, 33, 12, 20, 9, 41, 17, 28, 3, 50, 11, 24)


def make_recipe(**options: Any) -> FinetuneRecipe:
    """A recipe whose gradients are clipped, without a schedule."""
    defaults = {
        "rank": 4,
        "iters": 3,
        "batch_size": 3,
        "grad_accumulation_steps": 2,
        "learning_rate": 3e-4,
        "final_learning_rate": 3e-5,
        "schedule": "constant",
        "warmup_steps": 0,
        "clip_norm": 0.5,
        "max_seq_length": 64,
    }
    return FinetuneRecipe(data="none", **{**defaults, **options})


def make_samples(
    lengths: Sequence[int] = LENGTHS, vocab_size: int = 300, seed: int = 0
) -> list[Sample]:
    """Samples of random tokens, each with a masked prompt."""
    rng = np.random.default_rng(seed)
    samples = []
    for i, length in enumerate(lengths):
        loss_mask = np.arange(length) >= max(1, length // 3)
        loss_mask[-1] = i % 4 != 3 or length < 4  # some end without a target
        tokens = rng.integers(3, vocab_size, length).astype(np.int32)
        samples.append(Sample(tokens, loss_mask, f"train.jsonl:{i + 1}"))
    return samples


def make_pairs(number: int = 6) -> list[Pair]:
    """Pairs that share their prompt, with answers of different lengths."""
    rng = np.random.default_rng(2)
    pairs = []
    for i in range(number):
        prompt = rng.integers(3, 300, 3 + i)
        answers = []
        for length in (4 + 2 * i, 9 + (5 * i) % 7):
            tokens = np.concatenate([prompt, rng.integers(3, 300, length)])
            loss_mask = np.arange(len(tokens)) >= len(prompt)
            answers.append(
                Sample(tokens.astype(np.int32), loss_mask, f"train.jsonl:{i}")
            )
        pairs.append(Pair(*answers, f"train.jsonl:{i}"))
    return pairs


def make_model(
    recipe: FinetuneRecipe, config: OpenELMConfig = UNEVEN, *, perturb: bool = True
) -> OpenELM:
    """A model with an adapter; `perturb` makes the adapter's update non-zero."""
    model = build(config)
    make_trainable(model, recipe)
    if perturb and recipe.fine_tune_type != "full":
        rng = np.random.default_rng(1)
        for module in model.modules():
            for name in {"lora_b", "m"} & set(module):
                array = np.array(module[name])
                noise = 0.05 * rng.standard_normal(array.shape, dtype=np.float32)
                module[name] = mx.array(array + noise)
    return model


@dataclass(slots=True)
class SmallRun:
    """A run in memory; `norm` is that of the last step's gradient."""

    context: RunContext
    trainer: Trainer
    norm: float = 0.0

    @property
    def model(self) -> OpenELM:
        return self.context.model

    @property
    def order(self) -> Order:
        return self.context.order

    @property
    def progress(self) -> TrainingProgress:
        return self.context.progress


def make_training(
    recipe: FinetuneRecipe, samples: Samples, model: OpenELM | None = None
) -> SmallRun:
    model, world, folder = model or make_model(recipe), World(0, 1), Path("none")
    optimizer = make_optimizer(
        model, recipe.optimizer, recipe.betas, recipe.eps, recipe.weight_decay
    )
    objective, state = make_objective(recipe), TrainingState(model, optimizer)
    objective.precompute_reference(model, samples)
    order = Order(lengths_of(samples), recipe)
    log = EventLog(
        folder, state, steps=order.steps, world=world, on_event=lambda event: None
    )
    compiled = chooses_compiled(recipe, DEFAULT, world, None)
    context = RunContext(recipe, folder, objective, order, world, state, log, compiled)
    saver = RunSaver(context, {})
    validator = Validator(context, [], saver, lambda prompt: "")
    return SmallRun(context, Trainer(context, samples, saver, validator))


def step(training: SmallRun) -> dict[str, np.ndarray]:
    """Make one update; return the clipped gradients that the optimizer got."""
    received: dict[str, np.ndarray] = {}
    optimizer = training.context.state.optimizer
    update = optimizer.update

    def record(model: OpenELM, gradients: Any) -> None:
        received.update({n: np.array(g) for n, g in flatten(gradients).items()})
        update(model, gradients)

    optimizer.update = record
    try:
        training.norm = training.trainer.update(Stop()).norm
    finally:
        optimizer.update = update
    return received


def read_data(
    path: Path,
    objective: str = "sft",
    prompt_key: str | None = None,
    completion_key: str | None = None,
) -> Data:
    """Records as an objective reads them."""
    recipe = FinetuneRecipe(
        data=str(path),
        objective=objective,
        prompt_key=prompt_key,
        completion_key=completion_key,
    )
    return records.read_data(path, make_objective(recipe).formats())


def traced_update(training: SmallRun, samples: Sequence[Any]) -> tuple[Any, ...]:
    """Return the function of one compiled update, and its arguments."""
    step = training.trainer._step
    batch = step._objective.pad(samples)
    optimizer = training.context.state.optimizer
    trained, state = trained_tensors(training.model), flatten(optimizer.state)

    def graph(*arguments: Any) -> list[mx.array]:
        outputs = step._update_from_batch(*arguments)
        return [array for _, array in tree_flatten(list(outputs))]

    count, rate = mx.array(60.0), mx.array(1e-3)
    return graph, trained, state, batch.arrays, [], count, rate


def planned_memory(training: SmallRun, samples: Samples) -> int:
    """Return the bytes that are planned for a step."""
    recipe, lengths = training.context.recipe, lengths_of(samples)
    parts = recipe.grad_accumulation_steps
    batch = largest_batch(training.order, lengths, targets_of(samples), parts)
    return plan_memory(training.model, recipe, batch).total
