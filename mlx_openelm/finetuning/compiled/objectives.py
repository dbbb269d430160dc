"""The objectives of fine-tuning over padded batches, for the compiled training step."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_openelm.finetuning.batches import Batch
from mlx_openelm.finetuning.compiled.padding import PaddedShapes, pad
from mlx_openelm.finetuning.losses import preference_losses, preference_margins
from mlx_openelm.finetuning.objectives import (
    FinetuneObjective,
    Preference,
    Supervised,
)
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.model.likelihood import token_losses
from mlx_openelm.model.lora import adapted_weight
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.token_layout import PaddedSequences
from mlx_openelm.training.objective import PaddedBatch, PaddedObjective

Tensors = Mapping[str, mx.array]


def has_padded_form(recipe: FinetuneRecipe) -> bool:
    """Return whether a recipe can be trained with padded batches and a compiled step.

    Recipes with refinements (noise, LoRA+, rounded weights) are not.
    """
    is_refined = (
        recipe.neftune_noise > 0
        or recipe.lora_plus_ratio != 1
        or recipe.quantize_aware is not None
    )
    return recipe.objective in (Supervised.name, Preference.name) and not is_refined


def padded_objective(
    objective: FinetuneObjective,
    recipe: FinetuneRecipe,
    planned: Sequence[Sequence[Any]],
    longest: int,
) -> PaddedObjective:
    """Return an objective over padded batches.

    Args:
        planned: the samples of each micro-batch in the first steps of the run.
        longest: the most tokens of a sequence.
    """
    if isinstance(objective, Supervised):
        shapes = PaddedShapes(map(objective.collate, planned), longest)
        return _PaddedSupervised(objective, recipe, shapes)
    if isinstance(objective, Preference):
        pairs = max(map(len, planned), default=1)
        batches = (objective.collate(samples).batch for samples in planned)
        shapes = PaddedShapes(batches, longest)
        return _PaddedPreference(objective, recipe, shapes, pairs)
    raise TypeError(objective)


class _PaddedSupervised:
    def __init__(
        self, objective: Supervised, recipe: FinetuneRecipe, shapes: PaddedShapes
    ) -> None:
        self._objective, self._recipe, self._shapes = objective, recipe, shapes

    def pad(self, samples: Sequence[Any]) -> PaddedBatch:
        batch = self._objective.collate(samples)
        return PaddedBatch(_arrays(batch, self._shapes), len(batch.targets))

    def padded_loss(
        self, model: OpenELM, arrays: Tensors
    ) -> tuple[mx.array, mx.array, mx.array]:
        zero = mx.zeros(())
        loss = _target_losses(model, arrays, self._recipe.z_loss).sum()
        return loss, zero, zero


class _PaddedPreference:
    def __init__(
        self,
        objective: Preference,
        recipe: FinetuneRecipe,
        shapes: PaddedShapes,
        pairs: int,
    ) -> None:
        self._objective, self._recipe = objective, recipe
        self._shapes, self._pairs = shapes, pairs

    def pad(self, samples: Sequence[Any]) -> PaddedBatch:
        batch = self._objective.collate(samples)
        pairs, P = batch.num_pairs, max(self._pairs, batch.num_pairs)
        arrays = _arrays(batch.batch, self._shapes)
        sequence = np.array(arrays["sequence"])
        sequence[sequence >= pairs] += P - pairs  # the rejected answers follow
        reference = mx.pad(batch.reference.reshape(2, pairs), [(0, 0), (0, P - pairs)])
        arrays |= {
            "sequence": mx.array(sequence),
            "reference": reference.reshape(-1),
            "is_pair": mx.arange(P) < pairs,
        }
        return PaddedBatch(arrays, pairs)

    def padded_loss(
        self, model: OpenELM, arrays: Tensors
    ) -> tuple[mx.array, mx.array, mx.array]:
        sums = mx.zeros(arrays["reference"].shape)
        losses = _target_losses(model, arrays)
        likelihoods = sums.at[arrays["sequence"]].add(-losses)
        margins = preference_margins(
            likelihoods, arrays["reference"], beta=self._recipe.dpo_beta
        )
        is_pair = arrays["is_pair"]
        losses = preference_losses(margins, self._recipe.dpo_loss)
        wins = ((margins > 0) & is_pair).astype(mx.float32).sum()
        total = mx.where(is_pair, losses, 0).sum()
        return total, wins, mx.where(is_pair, margins, 0).sum()


def _arrays(batch: Batch, shapes: PaddedShapes) -> dict[str, mx.array]:
    padded = pad(batch, shapes.fit(batch))
    return {name: mx.array(array) for name, array in padded.items()}


def _target_losses(model: OpenELM, arrays: Tensors, z_loss: float = 0.0) -> mx.array:
    """Return the cross-entropy of each target, (M,); 0 for padding."""
    layout = PaddedSequences(
        arrays["places"], arrays["slots"], arrays["sources"], arrays["segments"]
    )
    hidden = model.transformer(arrays["tokens"][None], layout=layout).squeeze(0)
    losses = token_losses(
        hidden[arrays["positions"]],
        adapted_weight(model.head_module),
        arrays["targets"],
        z_loss=z_loss,
    )
    return mx.where(arrays["is_target"] > 0, losses, 0)
