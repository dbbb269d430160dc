"""The scores of `evaluate` as tables, JSON and CSV."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlx_openelm.cli.console import Console
from mlx_openelm.message_parts import count_of

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_openelm.evaluation.published_scores import PublishedScores
    from mlx_openelm.evaluation.results import (
        Metric,
        ModelScores,
        SuiteComparison,
        SuiteReport,
        TaskResult,
    )
    from mlx_openelm.evaluation.suites import Suite
    from mlx_openelm.evaluation.texts import TextScore

# Tables --------------------------------------------------------------------------


def show_scores(
    console: Console, scores: Sequence["ModelScores"], suite: "Suite | None"
) -> None:
    """Print the scores of texts, of a suite beside published scores, and of tasks."""
    from mlx_openelm.evaluation.results import compare_in_suite, report_suite

    if len(scores) == 1 and scores[0].text is not None:
        show_score(console, scores[0].text)
    elif any(model.text is not None for model in scores):
        console.answer_table(_table_texts(scores))
    if not scores[0].tasks:
        return
    if scores[0].text is not None:
        console.answer("")
    if suite is not None:
        for report in [report_suite(suite, s.card, s.tasks) for s in scores]:
            console.answer(_head(report))
            console.answer_table(_table_suite(report))
            console.answer("")
        for comparison in [compare_in_suite(suite, scores[0], s) for s in scores[1:]]:
            console.answer(f"{comparison.other} minus {comparison.first}")
            console.answer_table(_table_differences(comparison))
            for line in _describe_published(comparison):
                console.answer(line)
            console.answer("")
        if suite.published.others:
            console.answer("Others, as published")
            console.answer_table(_table_others(suite))
            for row in suite.published.others:
                if row.average_note:
                    console.answer(f"{row.model}: {row.average_note}")
            console.answer("")
    if suite is None or len(scores) > 1:
        console.answer_table(_table_tasks(scores))
        console.answer("")
    for line in explain_scores(scores, suite):
        console.answer(line)


def explain_scores(
    scores: Sequence["ModelScores"], suite: "Suite | None"
) -> Iterator[str]:
    """Yield the notes under the tables."""
    from mlx_openelm.evaluation.results import report_suite

    yield "Accuracies in percent \N{PLUS-MINUS SIGN} standard error."
    if len(scores) > 1:
        yield (
            f"Differences from {scores[0].card.name} are paired question by question."
        )
    if any(result.n < result.total for result in scores[0].tasks):
        yield "Only the first n questions of each task were used."
    if suite is None:
        return
    reports = [report_suite(suite, s.card, s.tasks) for s in scores]
    if any(report.published is not None for report in reports):
        yield (
            "The standard error of a difference from a published score assumes two "
            "samples of questions;\nif the questions are the same, it is too large."
        )
    yield from suite.notes


def show_score(console: Console, score: "TextScore") -> None:
    """Print the score of a text on one line."""
    console.answer(
        f"{score.bits_per_byte:.4f} bits per byte, {score.nats_per_token:.4f} nats per "
        f"token, perplexity {score.perplexity:.2f} ({count_of(score.tokens, 'token')}, "
        f"{count_of(score.bytes, 'byte')})"
    )


def _table_texts(scores: Sequence["ModelScores"]) -> "Table":
    table = new_table("model")
    for header in ("bits per byte", "nats per token", "perplexity", "tokens"):
        table.add_column(header, justify="right", no_wrap=True)
    for model in scores:
        if model.text is not None:
            table.add_row(
                model.card.name,
                f"{model.text.bits_per_byte:.4f}",
                f"{model.text.nats_per_token:.4f}",
                f"{model.text.perplexity:.2f}",
                f"{model.text.tokens:,}",
            )
    return table


def _table_tasks(scores: Sequence["ModelScores"]) -> "Table":
    """Return a row for each model and metric, with its difference from the first."""
    from mlx_openelm.evaluation.results import pair

    compared = len(scores) > 1
    table = new_table("task", "metric")
    for header in ("shots", "n"):
        table.add_column(header, justify="right")
    table.add_column("model", overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    if compared:
        table.add_column("difference", justify="right", no_wrap=True)
    first, *others = scores
    paired = [
        {(p.task, p.metric): p.difference for p in pair(first.tasks, other.tasks)}
        for other in others
    ]
    other_metrics = [{r.task: r.metrics for r in other.tasks} for other in others]
    for result in first.tasks:
        for name, metric in result.metrics.items():
            columns = (result.task, name, str(result.num_fewshot), f"{result.n:,}")
            row = (*columns, first.card.name, _show_metric(metric))
            table.add_row(*row, *([""] if compared else []))
            for other, metrics, differences in zip(
                others, other_metrics, paired, strict=True
            ):
                scored = metrics.get(result.task, {}).get(name)
                difference = differences.get((result.task, name))
                factor = _factor(metric)
                table.add_row(
                    *("", "", "", "", other.card.name),
                    _show_metric(scored) if scored else "-",
                    _show_signed(difference.value, difference.stderr, factor)
                    if difference
                    else "-",
                )
    return table


def _head(report: "SuiteReport") -> str:
    row = report.published
    if row is None:
        return f"{report.model}: no published scores for this model"
    method = ""
    if row.method:
        spelled = row.method.replace("lora", "LoRA").replace("dora", "DoRA")
        method = f" with {spelled}"
    checked = "checked" if row.verified else "from memory, UNVERIFIED"
    note = "".join(f"; {note}" for note in (row.note, row.average_note) if note)
    return f"{report.model} beside {row.model}{method} ({row.source}, {checked}{note})"


def _table_suite(report: "SuiteReport") -> "Table":
    table = new_table("column", "task", "metric")
    for header in ("shots", "n", "here", "published", "difference"):
        table.add_column(header, justify="right", no_wrap=True)
    for score in (*report.scores, *report.averages):
        task = score.task
        table.add_row(
            score.column,
            task.task if task else "",
            task.metric if task else "",
            str(task.num_fewshot) if task else "",
            f"{score.n:,}" if score.n else "",
            show_value(score.value, score.stderr),
            "-" if score.published is None else f"{score.published:.2f}",
            _show_signed(score.difference, score.difference_stderr),
        )
    return table


def _table_differences(comparison: "SuiteComparison") -> "Table":
    table = new_table("column")
    for header in ("n", "here, paired", "published"):
        table.add_column(header, justify="right", no_wrap=True)
    for one in comparison.differences:
        table.add_row(
            one.column,
            f"{one.n:,}" if one.n else "",
            _show_signed(one.value, one.stderr),
            _show_signed(one.published, None),
        )
    return table


def _describe_published(comparison: "SuiteComparison") -> Iterator[str]:
    """Yield where the published differences come from."""
    for row in comparison.rows:
        if row is not None:
            average = "" if row.average is None else f", average {row.average:.2f}"
            if row.average is None and row.without_sciq is not None:
                average = f", average without SciQ {row.without_sciq:.2f}"
            tokens = f" of {row.tokens} training tokens" if row.tokens else ""
            yield f"Published: {row.model}{tokens}{average} ({_source(row)})"


def _source(row: "PublishedScores") -> str:
    return row.source if row.verified else f"{row.source}, UNVERIFIED"


def _table_others(suite: "Suite") -> "Table":
    others = suite.published.others
    partial = any(row.without_sciq is not None for row in others)
    averages = ("average", *(("without SciQ",) if partial else ()))
    table = new_table("model")
    for header in ("tokens", *suite.published.columns, *averages):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("source")
    for row in others:
        shown = (*row.values, row.average, *((row.without_sciq,) if partial else ()))
        values = ["-" if v is None else f"{v:.2f}" for v in shown]
        table.add_row(row.model, row.tokens or "-", *values, _source(row))
    return table


def new_table(*columns: str) -> "Table":
    """Return a table without borders."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def is_share(metric: "Metric") -> bool:
    """Whether a metric is a fraction, which is shown in percent."""
    return bool(metric.values) and all(0 <= value <= 1 for value in metric.values)


def _factor(metric: "Metric") -> float:
    return 100.0 if is_share(metric) else 1.0


def _show_metric(metric: "Metric") -> str:
    return show_value(metric.value, metric.stderr, _factor(metric))


def show_value(value: float | None, stderr: float | None, factor: float = 1.0) -> str:
    """Format a value and its standard error, both times `factor`."""
    if value is None:
        return "-"
    spread = "" if stderr is None else f" \N{PLUS-MINUS SIGN} {stderr * factor:.2f}"
    return f"{value * factor:.2f}{spread}"


def _show_signed(value: float | None, stderr: float | None, factor: float = 1.0) -> str:
    sign = "" if value is None or value < 0 else "+"
    return sign + show_value(value, stderr, factor)


# JSON and CSV --------------------------------------------------------------------


def scores_json(
    scores: Sequence["ModelScores"], suite: "Suite | None"
) -> dict[str, Any]:
    """Return the scores for `--json`.

    The first model's scores are at the top level; with more than one model, all models'
    are under "models". Accuracies are fractions, except those of a suite (percent).
    """
    from mlx_openelm.evaluation.results import compare_in_suite, pair, report_suite

    first = scores[0]
    document: dict[str, Any] = {}
    if first.text is not None:
        document |= asdict(first.text)
    if first.tasks:
        document["tasks"] = tasks_json(first.tasks)
    if len(scores) > 1:
        document["models"] = [
            {
                "model": model.card.name,
                **(asdict(model.text) if model.text else {}),
                **({"tasks": tasks_json(model.tasks)} if model.tasks else {}),
            }
            for model in scores
        ]
        document["differences"] = [
            {
                "model": other.card.name,
                "from": first.card.name,
                "task": paired.task,
                "metric": paired.metric,
                **asdict(paired.difference),
            }
            for other in scores[1:]
            for paired in pair(first.tasks, other.tasks)
        ]
    if suite is not None:
        reports = [report_suite(suite, s.card, s.tasks) for s in scores]
        document["suite"] = {
            "name": suite.name,
            "notes": suite.notes,
            "models": [asdict(report) for report in reports],
            "comparisons": [
                asdict(compare_in_suite(suite, first, other)) for other in scores[1:]
            ],
            "columns": suite.published.columns,
            "others": [asdict(row) for row in suite.published.others],
        }
    return document


def tasks_json(results: Sequence["TaskResult"]) -> dict[str, Any]:
    """Return the scores of tasks by name."""
    tasks = {}
    for result in results:
        metrics = {
            name: {"value": _finite(metric.value), "stderr": _finite(metric.stderr)}
            for name, metric in result.metrics.items()
        }
        main = metrics.get("acc") or next(iter(metrics.values()), {})
        tasks[result.task] = {
            "acc": metrics.get("acc", {}).get("value"),
            "acc_norm": metrics.get("acc_norm", {}).get("value"),
            "stderr": main.get("stderr"),
            "n": result.n,
            "num_fewshot": result.num_fewshot,
            "metrics": metrics,
        }
    return tasks


def _finite(value: float | None) -> float | None:
    """Return None for an infinite value or NaN, which JSON cannot represent."""
    return value if value is not None and math.isfinite(value) else None


def to_csv(scores: Sequence["ModelScores"], suite: "Suite | None") -> str:
    """Return one line for each model, task and metric; accuracies are in percent."""
    from mlx_openelm.evaluation.results import pair, report_suite

    written = io.StringIO()
    lines = csv.writer(written, lineterminator="\n")
    lines.writerow(
        (
            *("model", "task", "metric", "num_fewshot", "n", "value", "stderr"),
            *("difference_from_first", "difference_stderr"),
            *("published", "published_verified"),
        )
    )
    for model in scores:
        others = () if model is scores[0] else model.tasks
        paired = {
            (p.task, p.metric): p.difference for p in pair(scores[0].tasks, others)
        }
        published = {}
        if suite is not None:
            report = report_suite(suite, model.card, model.tasks)
            published = {
                (score.task.task, score.task.metric): (
                    score.published,
                    report.published.verified,
                )
                for score in report.scores
                if score.task and report.published and score.published is not None
            }
        for result in model.tasks:
            for name, metric in result.metrics.items():
                key, factor = (result.task, name), _factor(metric)
                difference = paired.get(key)
                lines.writerow(
                    (
                        *(model.card.name, result.task, name, result.num_fewshot),
                        *(result.n, metric.value * factor),
                        _times(metric.stderr, factor),
                        _times(difference.value if difference else None, factor),
                        _times(difference.stderr if difference else None, factor),
                        *published.get(key, ("", "")),
                    )
                )
        if model.text is not None:
            for name in ("bits_per_byte", "nats_per_token", "perplexity"):
                lines.writerow(
                    (
                        *(model.card.name, "text", name, "", ""),
                        *(getattr(model.text, name), *[""] * 5),
                    )
                )
    return written.getvalue()


def _times(value: float | None, factor: float) -> float | str:
    return "" if value is None else value * factor
