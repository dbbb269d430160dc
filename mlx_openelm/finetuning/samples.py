"""Tokenized training samples. All lengths include BOS and EOS."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Example(Protocol):
    """One training example of an objective: a sequence, or a group of sequences.

    Attributes:
        place: file and line of its record, "train.jsonl:17".
    """

    @property
    def place(self) -> str: ...

    @property
    def sequences(self) -> "tuple[Sample, ...]": ...


Samples = Sequence[Example]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence.

    Attributes:
        tokens: int32 (L,); BOS first, EOS last unless the sequence is truncated.
        loss_mask: bool (L,); true for the targets of the loss, false for BOS.
        place: file and line of its record, "train.jsonl:17".
    """

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    place: str

    @property
    def sequences(self) -> "tuple[Sample, ...]":
        return (self,)


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference: one prompt with a chosen and a rejected answer."""

    chosen: Sample
    rejected: Sample
    place: str

    @property
    def sequences(self) -> tuple[Sample, ...]:
        return (self.chosen, self.rejected)


def lengths_of(samples: Samples) -> list[int]:
    """Return the number of tokens of each sample, over all its sequences."""
    return [sum(len(part.tokens) for part in s.sequences) for s in samples]


def targets_of(samples: Samples) -> list[int]:
    """Return the number of targets of each sample, over all its sequences."""
    return [sum(int(part.loss_mask.sum()) for part in s.sequences) for s in samples]
