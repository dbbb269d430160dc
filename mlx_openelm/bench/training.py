"""Updates of a model's new adapter, for measurements."""

from collections.abc import Callable, Sequence
from typing import Any

from mlx_openelm.finetuning.compiled.objectives import padded_objective
from mlx_openelm.finetuning.further_objectives.choice import make_objective
from mlx_openelm.finetuning.preparation import make_trainable
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.training.compiled_step import CompiledStep
from mlx_openelm.training.distributed import World
from mlx_openelm.training.optimizer import make_optimizer
from mlx_openelm.training.step import Part, Step


def make_update(
    model: OpenELM,
    recipe: FinetuneRecipe,
    parts: Sequence[Sequence[Any]],
    *,
    compiled: bool,
) -> tuple[Callable[[Sequence[Any], float], int], OpenELM]:
    """Return an update, and the model with the adapter that it trains.

    The update takes samples and a learning rate, and returns the number of targets.

    Args:
        parts: the samples of each update.
    """
    make_trainable(model, recipe)
    optimizer = make_optimizer(
        model, recipe.optimizer, recipe.betas, recipe.eps, recipe.weight_decay
    )
    objective = make_objective(recipe)
    step: Step | CompiledStep
    if compiled:
        longest = max(len(s.tokens) for part in parts for s in part)
        padded = padded_objective(objective, recipe, parts, longest)
        step = CompiledStep(model, padded, optimizer, clip_norm=recipe.clip_norm)
    else:
        world = World(0, 1)
        step = Step(model, objective, optimizer, world, clip_norm=recipe.clip_norm)

    def update(samples: Sequence[Any], rate: float) -> int:
        result = step.update([Part(0, (0,), samples)], learning_rate=rate)
        return result.totals.count

    return update, model
