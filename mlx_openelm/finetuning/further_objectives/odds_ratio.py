"""Preference optimization without a reference model (ORPO)."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_openelm.finetuning.batches import Batch, collate_pairs
from mlx_openelm.finetuning.data_table import SplitTable
from mlx_openelm.finetuning.losses import odds_ratio_losses, sequence_likelihoods
from mlx_openelm.finetuning.objectives import Preference
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.record_formats import RecordFormats, preference_formats
from mlx_openelm.finetuning.records import Dataset
from mlx_openelm.finetuning.samples import Pair, Samples
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.training.arrays import to_float
from mlx_openelm.training.objective import Totals


class OddsRatio:
    """ORPO; the margin of a pair is the log of its odds ratio."""

    name, label = "orpo", "orpo"
    unit, pairwise, likelihood = "pair", True, False
    default_length, default_rate = Preference.default_length, Preference.default_rate

    def __init__(self, recipe: FinetuneRecipe) -> None:
        self._recipe, self._preference = recipe, Preference(recipe)

    def formats(self) -> RecordFormats:
        return preference_formats(self.name, self._recipe.prompt_key)

    def make_samples(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        template: str,
        on_progress: Callable[[int], None] = lambda records: None,
    ) -> tuple[Samples, SplitTable]:
        return self._preference.make_samples(dataset, tokenizer, template, on_progress)

    def precompute_reference(self, model: OpenELM, samples: Sequence[Pair]) -> None:
        """Do nothing: the loss depends on the trained model alone."""

    def collate(self, samples: Sequence[Pair]) -> Batch:
        return collate_pairs(samples)

    def loss(self, model: OpenELM, batch: Batch) -> tuple[mx.array, mx.array]:
        losses, margins = self._losses(model, batch)
        return losses.sum(), margins

    def totals(self, batch: Batch, loss: mx.array, margins: mx.array) -> Totals:
        return Totals(
            to_float(loss),
            margins.size,
            wins=to_float((margins > 0).sum()),
            margin=to_float(margins.sum()),
        )

    def evaluate(self, model: OpenELM, batch: Batch) -> Totals:
        losses, margins = self._losses(model, batch, gradient=False)
        return self.totals(batch, losses.sum(), margins)

    def _losses(
        self, model: OpenELM, batch: Batch, *, gradient: bool = True
    ) -> tuple[mx.array, mx.array]:
        likelihoods = sequence_likelihoods(model, batch, gradient=gradient)
        counts = mx.array(np.bincount(batch.sequence, minlength=len(batch.lengths)))
        return odds_ratio_losses(likelihoods, counts, weight=self._recipe.orpo_weight)
