"""Paired differences of two models' scores on the same questions.

The standard error of the per-question differences is smaller than that of two separate
accuracies, because the scores of most questions are equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.multiple_choice import mean_and_stderr


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """The second mean minus the first, and its paired standard error.

    Attributes:
        stderr: None for a single question.
        gained, lost: numbers of questions on which the second is better, or worse.
    """

    value: float
    stderr: float | None
    n: int
    gained: int
    lost: int


def paired_difference(
    first: Sequence[float], second: Sequence[float]
) -> PairedDifference:
    """Return the mean difference of scores of the same questions in the same order.

    Raises:
        OpenELMError: the numbers of scores differ, or are 0.
    """
    if not first or len(first) != len(second):
        raise OpenELMError(
            f"There are {len(first)} and {len(second)} scores; a comparison needs the "
            "same questions on both sides."
        )
    changes = [b - a for a, b in zip(first, second, strict=True)]
    value, stderr = mean_and_stderr(changes)
    gained, lost = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    return PairedDifference(value, stderr, len(changes), gained, lost)
