"""The interface of a training objective, and the sums that it reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from mlx_openelm.model.openelm import OpenELM


@dataclass(slots=True)
class Totals:
    """Sums over all samples of a step or a validation.

    Attributes:
        loss: sum of the losses, in nats.
        count: number of target tokens (or pairs), the divisor of the mean loss.
        wins: number of pairs with a positive margin; 0 without pairs.
        margin: sum of the margins of pairs.
    """

    loss: float = 0.0
    count: int = 0
    wins: float = 0.0
    margin: float = 0.0

    def add(self, other: "Totals") -> None:
        self.loss += other.loss
        self.count += other.count
        self.wins += other.wins
        self.margin += other.margin


class Objective(Protocol):
    """A loss over samples of one kind.

    Attributes:
        unit: what the mean loss is taken over: "token" or "pair".
        pairwise: whether `Totals` has wins and margins.
    """

    unit: str
    pairwise: bool

    def collate(self, samples: Sequence[Any]) -> Any:
        """Return a batch of the samples."""

    def loss(self, model: OpenELM, batch: Any) -> tuple[mx.array, mx.array]:
        """Return the summed loss, to be differentiated, and the margins of pairs."""

    def totals(self, batch: Any, loss: mx.array, margins: mx.array) -> Totals:
        """Return the totals of a batch from the values of `loss`."""

    def evaluate(self, model: OpenELM, batch: Any) -> Totals:
        """Return the totals of a batch, computed without a gradient."""


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """A batch in arrays of few shapes, and the divisor of its mean loss."""

    arrays: Mapping[str, mx.array]
    count: int


class PaddedObjective(Protocol):
    """A loss over padded batches, which can be compiled."""

    def pad(self, samples: Sequence[Any]) -> PaddedBatch:
        """Return a padded batch of the samples."""

    def padded_loss(
        self, model: OpenELM, arrays: Mapping[str, mx.array]
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return the summed loss, to be differentiated, and wins and margin of pairs.

        They do not depend on padding. `Totals` describes them.
        """
