"""What the parts of a fine-tuning run share."""

from dataclasses import dataclass
from pathlib import Path

from mlx_openelm.finetuning.objectives import FinetuneObjective
from mlx_openelm.finetuning.plan import Order
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.training.distributed import World
from mlx_openelm.training.events import EventLog
from mlx_openelm.training.state import TrainingProgress, TrainingState


@dataclass(frozen=True, slots=True)
class RunContext:
    """A run: its options, and what its parts read and change together.

    Attributes:
        folder: where it is saved; exists, with its config, once training begins.
        state: the only part that changes.
    """

    recipe: FinetuneRecipe
    folder: Path
    objective: FinetuneObjective
    order: Order
    world: World
    state: TrainingState
    log: EventLog

    @property
    def model(self) -> OpenELM:
        return self.state.model

    @property
    def progress(self) -> TrainingProgress:
        return self.state.progress
