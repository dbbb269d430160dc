"""The objectives of fine-tuning: supervised (next token) and DPO (preferences).

Everything that differs between objectives is in their classes; more of them are in
`further_objectives`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_openelm.finetuning.batches import Batch, collate, collate_pairs
from mlx_openelm.finetuning.data_table import SplitTable
from mlx_openelm.finetuning.losses import (
    batch_losses,
    preference_losses,
    preference_margins,
    sequence_likelihoods,
)
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.record_formats import (
    RecordFormats,
    preference_formats,
    supervised_formats,
)
from mlx_openelm.finetuning.record_samples import make_pairs, make_samples
from mlx_openelm.finetuning.records import Dataset
from mlx_openelm.finetuning.samples import Pair, Sample, Samples
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.training.arrays import to_float
from mlx_openelm.training.objective import Objective, Totals


class FinetuneObjective(Objective, Protocol):
    """A loss, and how records are read and tokenized for it.

    Attributes:
        name: value of the recipe's `objective`.
        label: what the report shows after the method; can be empty.
        likelihood: whether the mean loss is a negative log-likelihood of tokens, so
            that its exponential is the perplexity.
        default_length, default_rate: defaults of `max_seq_length` and `learning_rate`.
    """

    name: str
    label: str
    likelihood: bool
    default_length: int
    default_rate: float

    def formats(self) -> RecordFormats:
        """Return the record formats that this objective reads."""

    def make_samples(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        template: str,
        on_progress: Callable[[int], None],
    ) -> tuple[Samples, SplitTable]:
        """Tokenize records; needs a resolved recipe.

        Args:
            on_progress: receives the number of finished records.
        """

    def precompute_reference(self, model: OpenELM, samples: Sequence[Any]) -> None:
        """Compute what the loss needs of the model before training, if anything.

        Args:
            samples: those of one split.
        """

    def loss(
        self, model: OpenELM, batch: Any, *, gradient: bool = True
    ) -> tuple[mx.array, mx.array]:
        """Return the summed loss and the margins of pairs.

        Args:
            gradient: whether the loss will be differentiated.
        """

    def evaluate(self, model: OpenELM, batch: Any) -> Totals:
        return self.totals(batch, *self.loss(model, batch, gradient=False))


class TokenObjective(FinetuneObjective):
    """An objective over the target tokens of supervised records."""

    unit, pairwise = "token", False
    default_length, default_rate = 2048, 3e-4

    def __init__(self, recipe: FinetuneRecipe) -> None:
        self._recipe = recipe

    def formats(self) -> RecordFormats:
        return supervised_formats(self._recipe.prompt_key, self._recipe.completion_key)

    def make_samples(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        template: str,
        on_progress: Callable[[int], None] = lambda records: None,
    ) -> tuple[Samples, SplitTable]:
        return make_samples(
            dataset,
            tokenizer,
            template=template,
            mask_prompt=self._recipe.mask_prompt,
            last_turn_only=self._recipe.turns == "last",
            repair_text=self._recipe.repair_text,
            max_length=self._recipe.max_seq_length or 0,
            on_progress=on_progress,
        )


class Supervised(TokenObjective):
    """Supervised fine-tuning: the mean negative log-likelihood of target tokens."""

    name, label, likelihood = "sft", "", True

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return collate(samples)

    def loss(
        self, model: OpenELM, batch: Batch, *, gradient: bool = True
    ) -> tuple[mx.array, mx.array]:
        z_loss = self._recipe.z_loss if gradient else 0.0
        losses = batch_losses(model, batch, z_loss=z_loss, gradient=gradient)
        return losses.sum(), mx.zeros(0)

    def totals(self, batch: Batch, loss: mx.array, margins: mx.array) -> Totals:
        return Totals(to_float(loss), len(batch.positions))


class PairObjective(FinetuneObjective):
    """An objective over pairs of answers: one chosen, one rejected."""

    unit, pairwise, likelihood = "pair", True, False
    default_length, default_rate = 1024, 5e-5

    def __init__(self, recipe: FinetuneRecipe) -> None:
        self._recipe = recipe

    def formats(self) -> RecordFormats:
        return preference_formats(self.name, self._recipe.prompt_key)

    def make_samples(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        template: str,
        on_progress: Callable[[int], None] = lambda records: None,
    ) -> tuple[Samples, SplitTable]:
        return make_pairs(
            dataset,
            tokenizer,
            template=template,
            max_length=self._recipe.max_seq_length or 0,
            max_prompt_length=self._recipe.max_prompt_length or 0,
            repair_text=self._recipe.repair_text,
            on_progress=on_progress,
        )

    def totals(self, batch: Any, loss: mx.array, margins: mx.array) -> Totals:
        return Totals(
            to_float(loss),
            margins.size,
            wins=to_float((margins > 0).sum()),
            margin=to_float(margins.sum()),
        )


@dataclass(frozen=True, slots=True)
class PairBatch:
    """A batch of P pairs with the log-likelihoods of the reference model.

    Attributes:
        batch: the chosen answers, then the rejected ones.
        reference: log-likelihoods of these answers, (2 P,).
    """

    batch: Batch
    reference: mx.array

    @property
    def num_pairs(self) -> int:
        return self.reference.size // 2


class Preference(PairObjective):
    """Direct preference optimization (DPO; Rafailov et al., arXiv 2305.18290).

    The reference model is the model before training. Its log-likelihoods are computed
    once, by `precompute_reference`.
    """

    name, label = "dpo", "dpo"

    def __init__(self, recipe: FinetuneRecipe) -> None:
        super().__init__(recipe)
        self._references: dict[str, tuple[float, float]] = {}  # by place

    def precompute_reference(self, model: OpenELM, samples: Sequence[Pair]) -> None:
        """Compute the log-likelihoods of all answers under the current model."""
        batch_size = self._recipe.batch_size
        for start in range(0, len(samples), batch_size):
            pairs = samples[start : start + batch_size]
            flat = sequence_likelihoods(model, collate_pairs(pairs), gradient=False)
            both = np.array(flat, np.float64).reshape(2, len(pairs)).T.tolist()
            for pair, (chosen, rejected) in zip(pairs, both, strict=True):
                self._references[pair.place] = (chosen, rejected)

    def collate(self, samples: Sequence[Pair]) -> PairBatch:
        references = mx.array([self._references[pair.place] for pair in samples])
        return PairBatch(collate_pairs(samples), references.T.reshape(-1))

    def loss(
        self, model: OpenELM, batch: PairBatch, *, gradient: bool = True
    ) -> tuple[mx.array, mx.array]:
        likelihoods = sequence_likelihoods(model, batch.batch, gradient=gradient)
        margins = preference_margins(
            likelihoods, batch.reference, beta=self._recipe.dpo_beta
        )
        return preference_losses(margins, self._recipe.dpo_loss).sum(), margins
