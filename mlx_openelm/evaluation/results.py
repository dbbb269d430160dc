"""Results of tasks, compared with other models and with published scores."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mlx_openelm.evaluation.multiple_choice import ScoredTask, mean_and_stderr
from mlx_openelm.evaluation.paired import PairedDifference, paired_difference
from mlx_openelm.evaluation.published_scores import (
    PublishedScores,
    find_other_scores,
    find_published_scores,
    published_name,
)
from mlx_openelm.evaluation.suites import Suite, SuiteTask
from mlx_openelm.evaluation.texts import TextScore
from mlx_openelm.storage.hub import snapshot_of
from mlx_openelm.storage.model_folder import ModelFolder


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of one task.

    Attributes:
        value: an accuracy is a fraction, not percent.
        stderr: standard error of the value, or None if unknown.
        values: the values by question, of which it is the mean; () if it is not a mean.
    """

    value: float
    stderr: float | None
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Scores of one model in one task.

    Attributes:
        num_fewshot: few-shot examples before each question.
        n: number of scored questions, of `total` in the task.
        digest: identifies the questions and their order.
        metrics: by the harness's names.
    """

    task: str
    num_fewshot: int
    n: int
    total: int
    digest: str
    metrics: Mapping[str, Metric]

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Return the result that `dataclasses.asdict` gave, stored as JSON.

        Raises:
            TypeError, KeyError: it is not one.
        """
        metrics = {
            name: Metric(metric["value"], metric["stderr"], tuple(metric["values"]))
            for name, metric in stored["metrics"].items()
        }
        return cls(**{**stored, "metrics": metrics})


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Identity of a model, by which its published scores are found.

    Attributes:
        name: as given by the user.
        size_name: "OpenELM-270M", or "OpenELM" for a size that was not published; of
            another model its name in the published tables, or "".
        method: of its adapter, or None.
    """

    name: str
    size_name: str
    instruct: bool = False
    method: str | None = None


@dataclass(frozen=True, slots=True)
class ModelScores:
    """All scores of one model."""

    card: ModelCard
    text: TextScore | None
    tasks: tuple[TaskResult, ...]

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Return the scores that `dataclasses.asdict` gave, stored as JSON.

        Raises:
            TypeError, KeyError: they are not such scores.
        """
        return cls(
            ModelCard(**stored["card"]),
            TextScore(**stored["text"]) if stored["text"] else None,
            tuple(map(TaskResult.from_json, stored["tasks"])),
        )


def describe_model(name: str, folder: ModelFolder, method: str | None) -> ModelCard:
    """Identify the published model of a folder by its sizes and its source.

    Args:
        name: as given by the user: the adapter's name if there is a `method`.
        method: of the attached adapter, or None; then that of a merged adapter counts.
    """
    source = folder.metadata.get("source")
    own_name = "" if method else Path(name).name  # an adapter's name does not count
    names = (own_name, folder.path.name, snapshot_of(folder.path), json.dumps(source))
    kind = str(source.get("kind", "")) if isinstance(source, dict) else ""
    fused = folder.metadata.get("fusion")
    if method is None and isinstance(fused, dict):
        method = str(fused.get("method"))
    if method is None and kind.endswith("merged"):
        method = next((m for m in ("dora", "lora") if m in kind.lower()), "adapter")
    instruct = "instruct" in str(names).lower()
    return ModelCard(name, folder.config.size_name, instruct, method)


def describe_other_model(name: str) -> ModelCard:
    """Identify a published model that is not an OpenELM, by its name."""
    return ModelCard(name, published_name(name) or "")


def from_local(scored: ScoredTask, total: int) -> TaskResult:
    """Return the result of a task that is a local file."""
    metrics = {}
    for name, right in (
        ("acc", [float(outcome.right) for outcome in scored.outcomes]),
        ("acc_norm", [float(outcome.right_norm) for outcome in scored.outcomes]),
    ):
        metrics[name] = Metric(*mean_and_stderr(right), tuple(right))
    return TaskResult(
        scored.task, 0, len(scored.outcomes), total, scored.digest, metrics
    )


# Models side by side -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PairedScore:
    """Difference of another model's score from the first one's on a task."""

    task: str
    metric: str
    difference: PairedDifference


def pair(
    first: Sequence[TaskResult], other: Sequence[TaskResult]
) -> tuple[PairedScore, ...]:
    """Return other - first for each metric that both models have."""
    by_task = {result.task: result for result in other}
    pairs = []
    for ours in first:
        theirs = by_task.get(ours.task)
        if theirs is None or ours.digest != theirs.digest:
            continue
        for name, metric in ours.metrics.items():
            values = theirs.metrics[name].values if name in theirs.metrics else ()
            if metric.values and len(values) == len(metric.values):
                difference = paired_difference(metric.values, values)
                pairs.append(PairedScore(ours.task, name, difference))
    return tuple(pairs)


# Published scores ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SuiteScore:
    """One column of a published table, or an average; in percent.

    Attributes:
        value: measured score; None if the task was not run.
        stderr: standard error of `value`.
        published: score of the same model, or None.
        difference: `value` - `published`.
        difference_stderr: for two independent samples of questions; the true one is
            smaller, because the questions are the same.
    """

    column: str
    task: SuiteTask | None
    value: float | None
    stderr: float | None
    published: float | None
    difference: float | None
    difference_stderr: float | None
    n: int | None


@dataclass(frozen=True, slots=True)
class SuiteReport:
    """A model's scores in a suite, and the `published` row that they compare with."""

    suite: str
    model: str
    published: PublishedScores | None
    scores: tuple[SuiteScore, ...]
    averages: tuple[SuiteScore, ...]


def report_suite(
    suite: Suite, card: ModelCard, results: Sequence[TaskResult]
) -> SuiteReport:
    """Compare a model's results with its published row."""
    row = _find_row(suite, card)
    by_task = {result.task: result for result in results}
    scores = []
    errors: dict[str, float | None] = {}  # of the published scores, by column
    for i, column in enumerate(suite.tasks):
        result = by_task.get(column.task)
        published = row.values[i] if row else None
        metric = result.metrics.get(column.metric) if result else None
        total = result.total if result else 0
        errors[column.name] = _published_stderr(published, total)
        scores.append(
            _compare(
                column.name,
                column,
                100 * metric.value if metric else None,
                100 * metric.stderr if metric and metric.stderr is not None else None,
                published,
                errors[column.name],
                result.n if result else None,
            )
        )
    averages = [_average("average", scores, errors)]
    if suite.name == "zero-shot":  # the paper has both
        others = [score for score in scores if score.column != "SciQ"]
        averages.append(_average("average without SciQ", others, errors))
    return SuiteReport(suite.name, card.name, row, tuple(scores), tuple(averages))


def _find_row(suite: Suite, card: ModelCard) -> PublishedScores | None:
    """Return the published row of a model, an OpenELM or another one."""
    return find_other_scores(suite.name, card.size_name) or find_published_scores(
        suite.name, card.size_name, instruct=card.instruct, method=card.method
    )


def _average(
    name: str, scores: Sequence[SuiteScore], errors: Mapping[str, float | None]
) -> SuiteScore:
    """Average the measured scores, and the published ones of the same columns."""
    run = [score for score in scores if score.value is not None]
    if len(run) < len(scores):
        name = f"{name} of {len(run)} of {len(scores)}"
    return _compare(
        name,
        None,
        _mean([score.value for score in run]),
        _mean_stderr([score.stderr for score in run]),
        _mean([score.published for score in run]),
        _mean_stderr([errors[score.column] for score in run]),
        None,
    )


def _compare(
    name: str,
    task: SuiteTask | None,
    value: float | None,
    stderr: float | None,
    published: float | None,
    published_stderr: float | None,
    n: int | None,
) -> SuiteScore:
    difference = both = None
    if value is not None and published is not None:
        difference = value - published
        if stderr is not None and published_stderr is not None:
            both = math.hypot(stderr, published_stderr)
    return SuiteScore(name, task, value, stderr, published, difference, both, n)


def _published_stderr(percent: float | None, total: int) -> float | None:
    """Return the standard error of a fraction of N questions, sqrt(p (1 - p) / N)."""
    if percent is None or not total:
        return None
    return math.sqrt(percent * (100 - percent) / total)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _mean_stderr(errors: Sequence[float | None]) -> float | None:
    """Return the standard error of a mean of independent scores."""
    known = [error for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return None
    return math.hypot(*known) / len(known)


# Two models in a suite ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SuiteDifference:
    """Another model's score minus the first one's, in percent.

    Attributes:
        stderr: of the paired difference `value`.
        published: the difference of the published scores, or None.
    """

    column: str
    value: float | None
    stderr: float | None
    published: float | None
    n: int | None


@dataclass(frozen=True, slots=True)
class SuiteComparison:
    """Differences of two models, measured and published; the last are of averages.

    Attributes:
        rows: the published rows of the first and the other model, if there are any.
    """

    first: str
    other: str
    rows: tuple[PublishedScores | None, PublishedScores | None]
    differences: tuple[SuiteDifference, ...]


def compare_in_suite(
    suite: Suite, first: ModelScores, other: ModelScores
) -> SuiteComparison:
    """Return other - first in each column, and in the averages of the columns run."""
    rows = _find_row(suite, first.card), _find_row(suite, other.card)
    paired = {(p.task, p.metric): p.difference for p in pair(first.tasks, other.tasks)}
    differences = []
    for i, column in enumerate(suite.tasks):
        difference = paired.get((column.task, column.metric))
        differences.append(
            SuiteDifference(
                column.name,
                100 * difference.value if difference else None,
                _percent(difference.stderr if difference else None),
                _subtract(*(row.values[i] if row else None for row in rows)),
                difference.n if difference else None,
            )
        )
    published = _subtract(*(row.average if row else None for row in rows))
    averages = [_average_difference("average", differences, published)]
    if suite.name == "zero-shot":
        others = [one for one in differences if one.column != "SciQ"]
        averages.append(_average_difference("average without SciQ", others, None))
    return SuiteComparison(
        first.card.name, other.card.name, rows, (*differences, *averages)
    )


def _average_difference(
    name: str, differences: Sequence[SuiteDifference], published: float | None
) -> SuiteDifference:
    """Average the measured differences, and the published ones of the same columns.

    Args:
        published: of the averages of all columns, if they are published.
    """
    run = [one for one in differences if one.value is not None]
    if len(run) < len(differences):
        name, published = f"{name} of {len(run)} of {len(differences)}", None
    if published is None:
        published = _mean([one.published for one in run])
    return SuiteDifference(
        name,
        _mean([one.value for one in run]),
        _mean_stderr([one.stderr for one in run]),
        published,
        None,
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _subtract(first: float | None, other: float | None) -> float | None:
    return None if first is None or other is None else other - first
