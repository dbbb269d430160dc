"""Preference optimization without a reference model (ORPO)."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_openelm.finetuning.batches import Batch, collate_pairs
from mlx_openelm.finetuning.losses import odds_ratio_losses, sequence_likelihoods
from mlx_openelm.finetuning.objectives import PairObjective
from mlx_openelm.finetuning.samples import Pair
from mlx_openelm.model.openelm import OpenELM


class OddsRatio(PairObjective):
    """ORPO; the margin of a pair is the log of its odds ratio."""

    name, label = "orpo", "orpo"

    def collate(self, samples: Sequence[Pair]) -> Batch:
        return collate_pairs(samples)

    def loss(
        self, model: OpenELM, batch: Batch, *, gradient: bool = True
    ) -> tuple[mx.array, mx.array]:
        likelihoods = sequence_likelihoods(model, batch, gradient=gradient)
        counts = mx.array(np.bincount(batch.sequence, minlength=len(batch.lengths)))
        losses, margins = odds_ratio_losses(
            likelihoods, counts, weight=self._recipe.orpo_weight
        )
        return losses.sum(), margins
