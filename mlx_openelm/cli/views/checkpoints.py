"""The scores of a run's checkpoints as a table, a picture and JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.views.evaluation import (
    explain_scores,
    is_share,
    new_table,
    show_value,
    tasks_json,
)
from mlx_openelm.reporting.curves import Curve, draw_curves

if TYPE_CHECKING:
    from mlx_openelm.evaluation.results import ModelScores
    from mlx_openelm.evaluation.suites import Suite

_BITS = "bits per byte"


@dataclass(frozen=True, slots=True)
class Curves:
    """The scores of each checkpoint, by training iteration (None: unknown)."""

    iterations: Sequence[int | None]
    scores: Sequence["ModelScores"]
    suite: "Suite | None"


@dataclass(frozen=True, slots=True)
class _Point:
    """A score; an accuracy and its standard error are in percent."""

    name: str
    value: float
    stderr: float | None
    in_percent: bool = True


def show_checkpoints(console: Console, curves: Curves) -> None:
    """Print a table with a row for each checkpoint."""
    names = _list_names(curves)
    table = new_table("checkpoint")
    for header in ("iteration", *names):
        table.add_column(header, justify="right", no_wrap=True)
    for iteration, model in zip(curves.iterations, curves.scores, strict=True):
        points = {point.name: point for point in _list_points(model, curves.suite)}
        cells = [
            "-"
            if (point := points.get(name)) is None
            else show_value(point.value, point.stderr)
            if point.in_percent
            else f"{point.value:.4f}"
            for name in names
        ]
        number = "-" if iteration is None else f"{iteration:,}"
        table.add_row(model.card.name, number, *cells)
    console.answer_table(table)
    if curves.scores[0].tasks:
        console.answer("")
        for line in explain_scores(curves.scores[:1], curves.suite):
            console.answer(line)


def draw_checkpoints(curves: Curves) -> str:
    """Return the picture of all scores over the iterations as an SVG document."""
    known = [i for i in curves.iterations if i is not None]
    steps = curves.iterations if known else range(1, len(curves.scores) + 1)
    drawn = []
    for name in _list_names(curves):
        points = []
        in_percent = True
        for step, model in zip(steps, curves.scores, strict=True):
            for point in _list_points(model, curves.suite):
                if point.name == name and step is not None:
                    points.append((step, point.value, point.stderr))
                    in_percent = point.in_percent
        drawn.append(Curve(name, points, in_percent))
    notes = ["Vertical lines are one standard error to each side."]
    without = [
        model.card.name
        for step, model in zip(steps, curves.scores, strict=True)
        if step is None
    ]
    if without:
        notes.append(f"Not drawn, as the name has no iteration: {', '.join(without)}.")
    title = f"Checkpoints: {curves.suite.name}" if curves.suite else "Checkpoints"
    axis = "iteration" if known else "checkpoint"
    return draw_curves([c for c in drawn if c.points], title, axis=axis, notes=notes)


def checkpoints_json(curves: Curves) -> dict[str, Any]:
    """Return the scores for `--json`, in the order of the table."""
    from mlx_openelm.evaluation.results import report_suite

    suite = curves.suite
    return {
        "checkpoints": [
            {
                "checkpoint": model.card.name,
                "iteration": iteration,
                **(asdict(model.text) if model.text else {}),
                **({"tasks": tasks_json(model.tasks)} if model.tasks else {}),
                **(
                    {"suite": asdict(report_suite(suite, model.card, model.tasks))}
                    if suite
                    else {}
                ),
            }
            for iteration, model in zip(curves.iterations, curves.scores, strict=True)
        ]
    }


def _list_names(curves: Curves) -> list[str]:
    names = (
        point.name
        for model in curves.scores
        for point in _list_points(model, curves.suite)
    )
    return list(dict.fromkeys(names))


def _list_points(model: "ModelScores", suite: "Suite | None") -> Iterator[_Point]:
    """Yield the scores of one model: of texts, then of a suite or of tasks."""
    from mlx_openelm.evaluation.results import report_suite

    if model.text is not None:
        yield _Point(_BITS, model.text.bits_per_byte, None, in_percent=False)
    if suite is not None:
        report = report_suite(suite, model.card, model.tasks)
        for score in (*report.scores, *report.averages):
            if score.value is not None:
                yield _Point(score.column, score.value, score.stderr)
        return
    for result in model.tasks:
        for name, metric in result.metrics.items():
            factor = 100 if is_share(metric) else 1
            stderr = None if metric.stderr is None else factor * metric.stderr
            yield _Point(
                f"{result.task} {name}", factor * metric.value, stderr, factor == 100
            )
