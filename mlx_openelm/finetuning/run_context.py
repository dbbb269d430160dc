"""The state that the parts of a fine-tuning run share."""

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
    """A fine-tuning run. Only `state` changes during training.

    Attributes:
        folder: the adapter folder; it exists, with its config, when training begins.
        compiled: whether updates are compiled, as on a GPU; see `CompiledStep`.
    """

    recipe: FinetuneRecipe
    folder: Path
    objective: FinetuneObjective
    order: Order
    world: World
    state: TrainingState
    log: EventLog
    compiled: bool = False

    @property
    def model(self) -> OpenELM:
        return self.state.model

    @property
    def progress(self) -> TrainingProgress:
        return self.state.progress
