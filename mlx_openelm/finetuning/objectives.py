"""The objectives of fine-tuning: supervised (next token), and DPO (preferences)."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_openelm.finetuning.batches import Batch, collate, collate_pairs
from mlx_openelm.finetuning.losses import (
    batch_losses,
    preference_losses,
    preference_margins,
    sequence_likelihoods,
)
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.samples import Pair, Sample
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.training.arrays import to_float
from mlx_openelm.training.objective import Objective, Totals


class Supervised:
    """The mean negative log-likelihood of the tokens that count."""

    unit, compares = "token", False

    def __init__(self, *, z_loss: float = 0.0) -> None:
        self._z_loss = z_loss

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return collate(samples)

    def loss(self, model: OpenELM, batch: Batch) -> tuple[mx.array, mx.array]:
        losses = batch_losses(model, batch, z_loss=self._z_loss)
        return losses.sum(), mx.zeros(0)

    def totals(self, batch: Batch, loss: mx.array, margins: mx.array) -> Totals:
        return Totals(to_float(loss), len(batch.positions))

    def evaluate(self, model: OpenELM, batch: Batch) -> Totals:
        loss = batch_losses(model, batch, gradient=False).sum()
        return Totals(to_float(loss), len(batch.positions))


@dataclass(frozen=True, slots=True)
class PairBatch:
    """A batch of pairs, and the log-likelihoods of their answers before training.

    Attributes:
        reference: (2 P,), of the chosen answers, then of the rejected ones.
    """

    batch: Batch
    reference: mx.array

    @property
    def num_pairs(self) -> int:
        return self.reference.size // 2


class Preference:
    """DPO (Rafailov et al., arXiv 2305.18290): chosen answers over rejected ones.

    The reference is the model before training: `precompute_reference` takes every pair
    before the first update.
    """

    unit, compares = "pair", True

    def __init__(self, *, beta: float, loss: str) -> None:
        self._beta, self._loss = beta, loss
        self._references: dict[str, tuple[float, float]] = {}  # by the pair's place

    def precompute_reference(
        self, model: OpenELM, pairs: Sequence[Pair], batch_size: int
    ) -> None:
        """Compute the log-likelihoods of all answers under the model as it is."""
        for start in range(0, len(pairs), batch_size):
            some = pairs[start : start + batch_size]
            both = sequence_likelihoods(model, collate_pairs(some), gradient=False)
            values = np.array(both, np.float64).reshape(2, len(some)).T.tolist()
            for pair, (chosen, rejected) in zip(some, values, strict=True):
                self._references[pair.place] = (chosen, rejected)

    def collate(self, samples: Sequence[Pair]) -> PairBatch:
        found = [self._references[pair.place] for pair in samples]
        return PairBatch(collate_pairs(samples), mx.array(found).T.reshape(-1))

    def loss(self, model: OpenELM, batch: PairBatch) -> tuple[mx.array, mx.array]:
        likelihoods = sequence_likelihoods(model, batch.batch)
        margins = preference_margins(likelihoods, batch.reference, beta=self._beta)
        return preference_losses(margins, self._loss).sum(), margins

    def totals(self, batch: PairBatch, loss: mx.array, margins: mx.array) -> Totals:
        return Totals(
            to_float(loss),
            batch.num_pairs,
            wins=to_float((margins > 0).sum()),
            margin=to_float(margins.sum()),
        )

    def evaluate(self, model: OpenELM, batch: PairBatch) -> Totals:
        likelihoods = sequence_likelihoods(model, batch.batch, gradient=False)
        margins = preference_margins(likelihoods, batch.reference, beta=self._beta)
        loss = preference_losses(margins, self._loss).sum()
        wins = to_float((margins > 0).sum())
        return Totals(to_float(loss), batch.num_pairs, wins=wins)


def make_objective(
    recipe: FinetuneRecipe, model: OpenELM, samples: Sequence[Sample] | Sequence[Pair]
) -> Objective:
    """Return the recipe's objective, ready for these samples.

    Args:
        samples: all that the run trains on, validates and tests.
    """
    if recipe.objective != "dpo":
        return Supervised(z_loss=recipe.z_loss)
    preference = Preference(beta=recipe.dpo_beta, loss=recipe.dpo_loss)
    pairs = [sample for sample in samples if isinstance(sample, Pair)]
    preference.precompute_reference(model, pairs, recipe.batch_size)
    return preference
