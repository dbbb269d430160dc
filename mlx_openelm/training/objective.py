"""What training minimises: the interface of an objective, and the sums it reports."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from mlx_openelm.model.openelm import OpenELM


@dataclass(slots=True)
class Totals:
    """Sums over the samples of a step or a validation, over all its parts.

    Attributes:
        loss: the sum of the losses, in nats.
        count: tokens (or pairs) that the loss is divided by.
        wins: pairs whose margin is positive; 0 where there are none.
        margin: the sum of the margins of pairs.
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
        unit: what the loss is divided by: "token", or "pair".
        compares: whether `Totals` has wins and margins.
    """

    unit: str
    compares: bool

    def collate(self, samples: Sequence[Any]) -> Any:
        """Return the samples as one batch."""

    def loss(self, model: OpenELM, batch: Any) -> tuple[mx.array, mx.array]:
        """Return the sum of the losses and the margins of pairs, to differentiate."""

    def totals(self, batch: Any, loss: mx.array, margins: mx.array) -> Totals:
        """Return the figures of a batch, once its loss is computed."""

    def evaluate(self, model: OpenELM, batch: Any) -> Totals:
        """Return the figures of a batch, without anything for a gradient."""
