"""The objective of a recipe.

A new objective is a class, an entry here and a name in `recipe.OBJECTIVES`.
"""

from collections.abc import Callable

from mlx_openelm.finetuning.further_objectives.distillation import Distillation
from mlx_openelm.finetuning.further_objectives.odds_ratio import OddsRatio
from mlx_openelm.finetuning.objectives import (
    FinetuneObjective,
    Preference,
    Supervised,
)
from mlx_openelm.finetuning.recipe import FinetuneRecipe

_OBJECTIVES: dict[str, Callable[[FinetuneRecipe], FinetuneObjective]] = {
    objective.name: objective
    for objective in (Supervised, Preference, OddsRatio, Distillation)
}


def make_objective(recipe: FinetuneRecipe) -> FinetuneObjective:
    """Return the recipe's objective."""
    return _OBJECTIVES[recipe.objective](recipe)
