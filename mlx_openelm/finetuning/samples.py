"""Samples: what a loss is taken of, as tokens. Lengths include BOS and EOS."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Example(Protocol):
    """What an objective takes its loss of: one sequence, or more that belong together.

    Attributes:
        place: the record, "train.jsonl:17".
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
        tokens: int32 (L,); BOS first, EOS last unless it is cut.
        counts: bool (L,); a token that counts is a target of the loss. BOS never is.
        place: the record, "train.jsonl:17".
    """

    tokens: npt.NDArray[np.int32]
    counts: npt.NDArray[np.bool_]
    place: str

    @property
    def sequences(self) -> "tuple[Sample, ...]":
        return (self,)


@dataclass(frozen=True, slots=True)
class Pair:
    """The same prompt with the better and the worse answer."""

    chosen: Sample
    rejected: Sample
    place: str

    @property
    def sequences(self) -> tuple[Sample, ...]:
        return (self.chosen, self.rejected)


def lengths_of(samples: Samples) -> list[int]:
    """Return the tokens of each sample, over all its sequences."""
    return [sum(len(part.tokens) for part in s.sequences) for s in samples]


def targets_of(samples: Samples) -> list[int]:
    """Return the tokens that count of each sample, over all its sequences."""
    return [sum(int(part.counts.sum()) for part in s.sequences) for s in samples]
