"""The scores of `evaluate` as a picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_openelm.cli.views.evaluation import is_share, show_value
from mlx_openelm.reporting.pictures import Score, ScoreRow, draw_scores

if TYPE_CHECKING:
    from mlx_openelm.evaluation.results import ModelScores, SuiteScore
    from mlx_openelm.evaluation.suites import Suite


def draw_evaluation(scores: Sequence["ModelScores"], suite: "Suite | None") -> str:
    """Return the picture of all shares as an SVG document."""
    rows = _list_rows(scores, suite)
    notes = ["Percent. The thin line goes one standard error to each side."]
    if any(score.published is not None for row in rows for score in row.scores):
        notes.append("Hollow: published for this model.")
    return draw_scores(
        [model.card.name for model in scores],
        rows,
        title=f"Scores: {suite.name}" if suite else "Scores",
        notes=[*notes, *(suite.notes if suite is not None else ())],
    )


def _list_rows(
    scores: Sequence["ModelScores"], suite: "Suite | None"
) -> list[ScoreRow]:
    """Return a row for each column of a suite, else for each share of a task."""
    from mlx_openelm.evaluation.results import report_suite

    rows: dict[tuple[str, str], list[Score]] = {}

    def add(
        name: str,
        label: str,
        model: int,
        value: float,
        stderr: float | None,
        published: float | None = None,
    ) -> None:
        text = show_value(value, stderr)
        score = Score(model, value, stderr, published, text)
        rows.setdefault((name, label), []).append(score)

    for i, model in enumerate(scores):
        if suite is not None:
            report = report_suite(suite, model.card, model.tasks)
            for s in (*report.scores, *report.averages):
                if s.value is not None:
                    add(s.column, _label(s), i, s.value, s.stderr, s.published)
            continue
        for result in model.tasks:
            shots = f"{result.num_fewshot} shots, " if result.num_fewshot else ""
            for name, metric in result.metrics.items():
                if is_share(metric):
                    stderr = None if metric.stderr is None else 100 * metric.stderr
                    label = f"{name}, {shots}n = {result.n:,}"
                    add(result.task, label, i, 100 * metric.value, stderr)
    return [ScoreRow(name, label, found) for (name, label), found in rows.items()]


def _label(score: "SuiteScore") -> str:
    if score.task is None:
        return ""
    return f"{score.task.metric}, {score.task.num_fewshot} shots, n = {score.n or 0:,}"
