"""Paired differences: two models' scores on the same questions.

The difference is taken question by question. Its standard error is smaller than what
two separate accuracies suggest, since most questions come out alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.multiple_choice import mean_and_stderr


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """The second mean less the first, and its paired standard error.

    Attributes:
        stderr: None, if there is one question.
        gained: questions on which the second is better; on `lost` it is worse.
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
        OpenELMError: they are not as many, or none.
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
