"""The contents of a run's report, from its metrics, its data and its recipe."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from mlx_openelm.finetuning.report.history import (
    History,
    describe_end,
    describe_result,
    read_history,
)
from mlx_openelm.reporting.charts import Chart, Line, Mark
from mlx_openelm.reporting.number_formats import (
    format_bytes,
    format_count,
    format_number,
    format_share,
)
from mlx_openelm.reporting.run_history import (
    Column,
    group_samples,
    read_points,
    read_step,
    tabulate,
)
from mlx_openelm.reporting.training_report import (
    DataSummary,
    Histogram,
    Table,
    TrainingReport,
)
from mlx_openelm.training.events import Event

REFRESH_SECONDS = 15


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingRun:
    """A run as its folder and its plan describe it.

    Attributes:
        name: of the data.
        events: the rows of metrics.jsonl.
        data: data.json.
        recipe: the text of recipe.yaml.
        commands: description and command line.
        likelihood: the loss is the negative log-likelihood of tokens.
        progress: while the run is in progress, a sentence about it; else None.
        failure: why the run failed, if it did.
    """

    name: str
    model: str
    facts: Mapping[str, str]
    events: Sequence[Event]
    data: Mapping[str, Any]
    recipe: str
    commands: Sequence[tuple[str, str]]
    likelihood: bool
    progress: str | None = None
    failure: str | None = None


def describe_run(run: TrainingRun) -> TrainingReport:
    """Return the contents of the page."""
    history = read_history(run.events, likelihood=run.likelihood)
    result, status = describe_result(history), describe_end(history, run.failure)
    if run.progress is not None:
        if not history.steps and not history.evals:
            result = "Training has started."
        status = (
            f"{run.progress} This page reloads every {REFRESH_SECONDS} seconds until "
            "the run ends."
        )
    return TrainingReport(
        title=f"{run.model} fine-tuned on {run.name}",
        result=result,
        status=status,
        refresh_seconds=REFRESH_SECONDS if run.progress is not None else None,
        facts=run.facts,
        charts=[_loss_chart(history), *_small_charts(history)],
        numbers=_tabulate(history) if history.steps or history.evals else None,
        skipped=[(read_step(row), _places(row)) for row in history.skips],
        samples=list(group_samples(history.samples, _best_step(history))),
        data=_summarize(run.data) if run.data else None,
        commands=run.commands,
        recipe=run.recipe,
    )


# Charts ----------------------------------------------------------------------------


def _loss_chart(history: History) -> Chart:
    lines = [Line("training", read_points(history.steps, "loss"), "blue", trend=True)]
    best = _best_step(history)
    validation = read_points(history.evals, "loss")
    if validation:
        lines.append(Line("validation", validation, "orange", dotted=True, best=best))
    resumes = len(history.resumed)
    times = "" if resumes == 1 else f" ({resumes} times)"
    return Chart(
        name="loss",
        title="Loss, nats per token" if history.likelihood else "Loss",
        lines=lines,
        last_step=history.last_step,
        format=format_number,
        marks=[
            Mark(f"resumed{times}", history.resumed, "muted", "dashed"),
            Mark(
                "batch skipped", [read_step(r) for r in history.skips], "red", "dotted"
            ),
        ],
    )


def _best_step(history: History) -> float | None:
    return None if history.best is None else read_step(history.best)


def _small_charts(history: History) -> Iterable[Chart]:
    for key, title, form, from_zero in (
        ("accuracy", "Chosen answer preferred, share of pairs", format_share, True),
        ("margin", "Margin of the chosen answer", format_number, False),
        ("learning_rate", "Learning rate", format_number, True),
        ("grad_norm", "Gradient norm", format_number, False),
        ("tokens_per_second", "Trained tokens per second", format_count, True),
    ):
        lines = [Line("training", read_points(history.steps, key), "blue")]
        validation = read_points(history.evals, key)
        if any(value is not None for _, value in validation):
            lines.append(Line("validation", validation, "orange", dotted=True))
        yield Chart(key, title, lines, history.last_step, form, from_zero=from_zero)
    memory = (
        Line("allocated", read_points(history.steps, "memory_bytes"), "blue"),
        Line("peak", read_points(history.steps, "peak_memory_bytes"), "orange"),
    )
    lines = [line for line in memory if any(y is not None for _, y in line.points)]
    yield Chart(
        "memory", "Memory", lines, history.last_step, format_bytes, from_zero=True
    )


# Metrics -----------------------------------------------------------------------------

_COLUMNS: Sequence[Column] = (
    ("epoch", "epoch", lambda v: f"{v:.2f}"),
    ("loss", "loss", lambda v: f"{v:.4f}"),
    ("validation", "validation", lambda v: f"{v:.4f}"),
    ("accuracy", "accuracy", format_share),
    ("margin", "margin", format_number),
    ("learning_rate", "learning rate", format_number),
    ("grad_norm", "gradient norm", format_number),
    ("tokens", "tokens", format_count),
    ("tokens_per_second", "tokens/s", format_count),
    ("memory_bytes", "memory", format_bytes),
    ("peak_memory_bytes", "peak", format_bytes),
    ("seconds", "seconds", lambda v: f"{v:,.1f}"),
)


def _tabulate(history: History) -> Table:
    """Return the values of the charts, for screen readers and copying."""
    rows: dict[float, dict[str, Any]] = {}
    for row in history.evals:
        rows[read_step(row)] = {
            "validation": row.get("loss"),
            "tokens": row.get("tokens"),
        }
    for row in history.steps:
        rows.setdefault(read_step(row), {}).update(row)
    return tabulate(rows, _COLUMNS)


def _places(row: Event) -> list[str]:
    places = row.get("samples")
    return [str(place) for place in places] if isinstance(places, list | tuple) else []


# Data --------------------------------------------------------------------------------

_FACTS = {  # of a split, in order; other facts follow
    "file": "file",
    "format": "format",
    "fields": "fields",
    "records": "records",
    "samples": "samples",
    "tokens": "tokens",
    "targets": "tokens in the loss",
    "lengths": "lengths in tokens",
    "shortest": "shortest",
    "median": "median",
    "longest": "longest",
    "cut": "truncated at the end",
    "prompt_cut": "prompt truncated",
    "nothing_to_learn": "without a token in the loss",
    "spelt_eos": "with </s> in the text",
    "duplicates": "duplicates",
    "in_train": "also in train",
}


def _summarize(data: Mapping[str, Any]) -> DataSummary:
    splits = {name: facts for name, facts in data.items() if isinstance(facts, Mapping)}
    warnings = data.get("warnings")
    names = dict.fromkeys(fact for facts in splits.values() for fact in facts)
    names.pop("edges", None)  # shown with the lengths
    ordered = [fact for fact in _FACTS if fact in names]
    ordered += [fact for fact in names if fact not in _FACTS]
    return DataSummary(
        warnings=[str(w) for w in warnings]
        if isinstance(warnings, list | tuple)
        else [],
        facts={
            _spell(name): _show_value(name, value)
            for name, value in data.items()
            if name not in (*splits, "warnings") and value is not None
        },
        splits=list(splits),
        rows=[
            (
                _FACTS.get(fact, _spell(fact)),
                [_show_fact(split, fact) for split in splits.values()],
            )
            for fact in ordered
        ],
    )


def _show_fact(split: Mapping[str, Any], fact: str) -> str | Histogram:
    histogram = _read_histogram(split) if fact == "lengths" else None
    return histogram or _show_value(fact, split.get(fact))


def _read_histogram(split: Mapping[str, Any]) -> Histogram | None:
    """Return ranges and counts of the lengths, if they are as in `SplitTable`."""
    edges, counts = split.get("edges"), split.get("lengths")
    if not (isinstance(edges, list | tuple) and isinstance(counts, list | tuple)):
        return None
    if len(edges) != len(counts) + 1 or not counts:
        return None
    if not all(isinstance(value, int) and value >= 0 for value in (*edges, *counts)):
        return None
    return Histogram([(a + 1, b) for a, b in pairwise(edges)], counts)


def _spell(key: object) -> str:
    return str(key).replace("_", " ")


def _show_value(name: str, value: object) -> str:
    if name == "digest":
        return str(value)[:12]
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_show_value("", part) for part in value) or "none"
    return str(value)
