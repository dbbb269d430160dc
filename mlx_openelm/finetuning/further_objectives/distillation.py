"""Training on a teacher's next-token distributions (Hinton et al., 1503.02531)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_openelm.finetuning.batches import Batch, collate
from mlx_openelm.finetuning.further_objectives.teacher import (
    Teacher,
    TeacherFolder,
    TeacherModel,
)
from mlx_openelm.finetuning.further_objectives.teacher_cache import TeacherCache
from mlx_openelm.finetuning.losses import target_rows
from mlx_openelm.finetuning.objectives import TokenObjective
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.run_folder import run_folder
from mlx_openelm.finetuning.samples import Sample, Samples
from mlx_openelm.model.divergence import TeacherTargets, divergences
from mlx_openelm.model.likelihood import token_losses
from mlx_openelm.model.lora import adapted_weight
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.paths import user_path
from mlx_openelm.storage.staging import refuse_nested
from mlx_openelm.training.arrays import to_float
from mlx_openelm.training.objective import Totals


@dataclass(frozen=True, slots=True)
class TaughtBatch:
    """A batch with the teacher's distributions at its targets."""

    batch: Batch
    teacher: TeacherTargets


class Distillation(TokenObjective):
    """(1 - w) times the loss of supervised training, plus w T^2 KL(teacher || model).

    w is `distill_weight`; the divergence is that of the distributions at temperature T,
    and T^2 keeps its gradient independent of T. With `teacher_cache` it is a lower
    bound: see `model.divergence.TopTargets`.
    """

    name, label, likelihood = "distill", "distill", False

    def __init__(self, recipe: FinetuneRecipe) -> None:
        super().__init__(recipe)
        self._teacher: Teacher | None = None

    def open_cache(self, teacher: TeacherFolder, splits: Sequence[Samples]) -> None:
        """Open the cache of the teacher, if there is to be one; compute nothing.

        Raises:
            OpenELMError: it belongs to other records or another teacher, or is in the
                folder of the run.
        """
        recipe = self._recipe
        if recipe.teacher_cache is not None:
            folder = user_path(recipe.teacher_cache)
            refuse_nested("cache of the teacher", folder, "run", run_folder(recipe))
            self._teacher = TeacherCache(
                folder,
                teacher,
                [part for split in splits for s in split for part in s.sequences],
                temperature=recipe.temperature,
                top_k=recipe.teacher_top_k,
                batch_size=recipe.batch_size,
            )

    def load_teacher(
        self,
        teacher: TeacherFolder,
        on_progress: Callable[[int, int, str], None] = lambda done, total, unit: None,
    ) -> None:
        """Load the teacher, or compute what its cache does not have yet.

        Raises:
            OpenELMError: the cache cannot be written.
        """
        if isinstance(self._teacher, TeacherCache):
            self._teacher.compute(on_progress)
        else:
            self._teacher = TeacherModel(teacher, self._recipe.temperature)

    def collate(self, samples: Sequence[Sample]) -> TaughtBatch:
        assert self._teacher is not None, "load_teacher comes first"
        batch = collate(samples)
        return TaughtBatch(batch, self._teacher.targets(batch, samples))

    def loss(
        self, model: OpenELM, batch: TaughtBatch, *, gradient: bool = True
    ) -> tuple[mx.array, mx.array]:
        recipe = self._recipe
        rows, head = target_rows(model, batch.batch), adapted_weight(model.head_module)
        weight, temperature = recipe.distill_weight, recipe.temperature
        losses = mx.zeros(rows.shape[0])
        if weight:
            divergence = divergences(
                rows, head, batch.teacher, temperature=temperature, gradient=gradient
            )
            losses = losses + weight * temperature**2 * divergence
        if weight < 1:
            targets = mx.array(batch.batch.targets)
            losses = losses + (1 - weight) * token_losses(
                rows, head, targets, z_loss=recipe.z_loss, gradient=gradient
            )
        return losses.sum(), mx.zeros(0)

    def totals(self, batch: TaughtBatch, loss: mx.array, margins: mx.array) -> Totals:
        return Totals(to_float(loss), len(batch.batch.positions))
