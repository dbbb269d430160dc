"""Tokenized training samples. All lengths include BOS and EOS."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

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
_BLOCK = 4096  # samples that are joined at once


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


class PackedSamples(Sequence[Sample]):
    """Samples in two arrays: a million short ones take 100 MB, not a gigabyte."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        parts: list[Sample] = []
        tokens, masks = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
        self._places: list[str] = []
        lengths: list[int] = []

        def pack() -> None:
            tokens.append(np.concatenate([part.tokens for part in parts]))
            masks.append(np.concatenate([part.loss_mask for part in parts]))
            parts.clear()

        for sample in samples:
            parts.append(sample)
            lengths.append(len(sample.tokens))
            self._places.append(sample.place)
            if len(parts) == _BLOCK:
                pack()
        if parts:
            pack()
        self._tokens, self._masks = np.concatenate(tokens), np.concatenate(masks)
        self._ends = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        part = slice(self._ends[index], self._ends[index + 1])
        return Sample(self._tokens[part], self._masks[part], self._places[index])

    @property
    def lengths(self) -> list[int]:
        """The tokens of each sample."""
        lengths: list[int] = np.diff(self._ends).tolist()
        return lengths

    @property
    def targets(self) -> list[int]:
        """The targets of each sample."""
        counts = np.concatenate([[0], np.cumsum(self._masks)])
        targets: list[int] = np.diff(counts[self._ends]).tolist()
        return targets


def sizes_of(samples: Samples) -> list[int]:
    """Return the number of tokens of each sequence of all samples."""
    if isinstance(samples, PackedSamples):
        return samples.lengths
    return [len(part.tokens) for sample in samples for part in sample.sequences]


def lengths_of(samples: Samples) -> list[int]:
    """Return the number of tokens of each sample, over all its sequences."""
    if isinstance(samples, PackedSamples):
        return samples.lengths
    return [sum(len(part.tokens) for part in s.sequences) for s in samples]


def targets_of(samples: Samples) -> list[int]:
    """Return the number of targets of each sample, over all its sequences."""
    if isinstance(samples, PackedSamples):
        return samples.targets
    return [sum(int(part.loss_mask.sum()) for part in s.sequences) for s in samples]
