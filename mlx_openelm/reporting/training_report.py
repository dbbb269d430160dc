"""The report of a training run: one HTML page without scripts or requests.

Text from outside (samples, file names, the recipe) is escaped, and the page forbids
scripts and requests by its Content-Security-Policy.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from mlx_openelm.reporting.charts import LARGE, SMALL, Chart, draw_chart
from mlx_openelm.reporting.rendering import render

MAX_SKIPPED = 50  # skipped batches that are listed


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """Columns of numbers; the first cell of a row is its heading."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of adjacent ranges."""

    ranges: Sequence[tuple[int, int]]  # first and last value
    counts: Sequence[int]


@dataclasses.dataclass(frozen=True, slots=True)
class DataSummary:
    """The data of a run: warnings, facts, and the splits side by side."""

    warnings: Sequence[str]
    facts: Mapping[str, str]
    splits: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str | Histogram]]]  # a name, one cell per split


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    caption: str
    prompt: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingReport:
    """The contents of the page.

    Attributes:
        result: a sentence about the loss.
        status: sentences about the progress or the end of the run.
        refresh_seconds: the page reloads itself after that time; None: never.
        charts: the first one is drawn large; those without a value are left out.
        skipped: steps whose batch was skipped, with the places of its samples.
        samples: groups that are shown side by side.
        commands: description and command line.
        recipe_file: where the recipe is saved, in the folder of the page.
    """

    title: str
    result: str
    status: str
    refresh_seconds: int | None
    facts: Mapping[str, str]
    charts: Sequence[Chart]
    numbers: Table | None
    skipped: Sequence[tuple[float, Sequence[str]]]
    samples: Sequence[Sequence[Sample]]
    data: DataSummary | None
    commands: Sequence[tuple[str, str]]
    recipe: str
    recipe_file: str = "recipe.yaml"


def render_training_report(report: TrainingReport) -> str:
    """Return the page as HTML."""
    first, *others = report.charts
    return render(
        "training_report.html",
        report=report,
        large=draw_chart(first, (LARGE, SMALL)) if first.values else None,
        small=[draw_chart(chart) for chart in others if chart.values],
        max_skipped=MAX_SKIPPED,
    )
