"""The choice of the update: compiled on a GPU, else plain."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_openelm.device import takes_gpu_path
from mlx_openelm.finetuning.batches import share_out
from mlx_openelm.finetuning.compiled.objectives import has_padded_form, padded_objective
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.run_context import RunContext
from mlx_openelm.finetuning.samples import Samples
from mlx_openelm.training.compiled_step import CompiledStep
from mlx_openelm.training.distributed import World
from mlx_openelm.training.state import load_state
from mlx_openelm.training.step import Step
from mlx_openelm.tuning import Tuning

COMPILED = "compiled"  # key of the run's identity in the saved state
_PLANNED_STEPS = 500  # whose batches the padded shapes are made for


def chooses_compiled(
    recipe: FinetuneRecipe, tuning: Tuning, world: World, resumed: Path | None
) -> bool:
    """Return whether the updates of a run are compiled.

    A resumed run does as it did, so that its result is that of an uninterrupted one.

    Args:
        resumed: the folder of the run to resume, or None.
    """
    if world.size > 1 or not has_padded_form(recipe):
        return False
    if resumed is not None:
        return bool(load_state(resumed).run.get(COMPILED, False))
    chosen = tuning.compiled_training
    return takes_gpu_path() if chosen is None else chosen


def make_step(
    run: RunContext, train: Samples, lengths: Sequence[int]
) -> Step | CompiledStep:
    """Return the update of a run.

    Args:
        lengths: tokens of each sample.
    """
    clip_norm, optimizer = run.recipe.clip_norm, run.state.optimizer
    if not run.compiled:
        return Step(run.model, run.objective, optimizer, run.world, clip_norm=clip_norm)
    objective = padded_objective(
        run.objective,
        run.recipe,
        _planned_parts(run, train, lengths),
        longest=max(len(part.tokens) for s in train for part in s.sequences),
    )
    return CompiledStep(run.model, objective, optimizer, clip_norm=clip_norm)


def _planned_parts(
    run: RunContext, train: Samples, lengths: Sequence[int]
) -> list[list[Any]]:
    """Return the samples of each micro-batch of the first steps."""
    count = run.recipe.grad_accumulation_steps
    return [
        [train[i] for i in share]
        for step in range(min(run.order.steps, _PLANNED_STEPS))
        for share in share_out(run.order.batch(step), lengths, count)
        if share
    ]
