"""Two models answered the same questions: is one better, or was it luck?

The difference is taken question by question. Its standard error is smaller than what
two separate accuracies suggest, since most questions come out alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.multiple_choice import ScoredTask, mean_and_stderr


@dataclass(frozen=True, slots=True)
class Difference:
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


@dataclass(frozen=True, slots=True)
class TaskDifference:
    """How much better the second model does on a task."""

    task: str
    acc: Difference
    acc_norm: Difference


def compare(first: ScoredTask, second: ScoredTask) -> TaskDifference:
    """Compare two models' outcomes on a task.

    Raises:
        OpenELMError: they did not answer the same questions.
    """
    if (first.task, first.digest) != (second.task, second.digest):
        raise OpenELMError(
            f"{first.task} ({first.score.n} questions) and {second.task} "
            f"({second.score.n}) are not the same questions; score both models on one "
            "file with one limit."
        )
    pairs = first.outcomes, second.outcomes
    acc = ([float(o.right) for o in outcomes] for outcomes in pairs)
    acc_norm = ([float(o.right_norm) for o in outcomes] for outcomes in pairs)
    return TaskDifference(
        first.task, paired_difference(*acc), paired_difference(*acc_norm)
    )


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
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
    return Difference(value, stderr, len(changes), gained, lost)
