"""The report of a fine-tuning run: one HTML file that loads nothing and runs nothing.

All text from outside (output of the model, file names, the recipe) is escaped. The page
also forbids scripts and requests by its Content-Security-Policy.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_openelm.finetuning.report_charts import (
    CHART_STYLE,
    Chart,
    Line,
    Mark,
    draw,
    smooth,
)
from mlx_openelm.finetuning.report_history import (
    History,
    describe_end,
    describe_result,
    read_history,
    read_points,
    read_step,
)
from mlx_openelm.finetuning.report_style import PAGE_STYLE
from mlx_openelm.finetuning.report_tables import render_data, render_numbers
from mlx_openelm.finetuning.report_values import (
    escape_text,
    show_bytes,
    show_count,
    show_figure,
    show_share,
)
from mlx_openelm.training.events import Event

MOST_SKIPPED = 50  # skipped batches that are listed
SMOOTH_FROM = 60  # a line with more points also gets its running mean


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingRun:
    """The contents of the page."""

    name: str  # of the data
    model: str
    facts: Mapping[str, str]  # in order
    events: Sequence[Event]  # the rows of metrics.jsonl
    data: Mapping[str, Any]  # data.json
    recipe: str  # the text of recipe.yaml
    commands: Sequence[tuple[str, str]]  # description, command line
    likelihood: bool  # the loss is the negative log-likelihood of tokens


def render_page(run: TrainingRun) -> str:
    """Return the page as HTML."""
    history = read_history(run.events, likelihood=run.likelihood)
    title = f"{run.model} fine-tuned on {run.name}"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape_text(title)}</title>",
        f"<style>{PAGE_STYLE}{CHART_STYLE}</style></head><body><main>",
        f"<header><h1>{escape_text(title)}</h1>",
        f'<p class="result">{escape_text(describe_result(history))}</p>',
        f"<p>{escape_text(describe_end(history))}</p></header>",
        _render_facts(run.facts),
        *_render_charts(history),
        *_render_skipped(history),
        *_render_samples(history),
        *render_data(run.data),
        *_render_commands(run.commands),
        *_render_recipe(run.recipe),
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


# Sections ----------------------------------------------------------------------


def _render_facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    items = "".join(
        f"<div><dt>{escape_text(name)}</dt><dd>{escape_text(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{items}</dl>'


def _render_charts(history: History) -> Iterable[str]:
    drawn = _draw_loss(history)
    if drawn:
        yield f"<section><h2>Loss</h2>{drawn}</section>"
    small = [chart for chart in _draw_small(history) if chart]
    if small:
        yield '<section><h2>Along the way</h2><div class="small">'
        yield from small
        yield "</div></section>"
    if history.steps or history.evals:
        yield render_numbers(history)


def _draw_loss(history: History) -> str:
    training = read_points(history.steps, "loss")
    lines = _with_mean(Line("training", training, "first"))
    best = None if history.best is None else int(read_step(history.best))
    validation = read_points(history.evals, "loss")
    if validation:
        lines.append(Line("validation", validation, "second", dotted=True, best=best))
    unit = ", nats per token" if history.likelihood else ""
    chart = Chart(
        title=f"Loss{unit}",
        lines=lines,
        last_step=history.last_step,
        format=show_figure,
        marks=_find_marks(history),
    )
    return draw(chart, "loss").replace('class="chart"', 'class="chart large"', 1)


def _with_mean(line: Line) -> list[Line]:
    """Return the line; with many points drawn faint, with its running mean."""
    if len(line.points) < SMOOTH_FROM:
        return [line]
    width = max(5, len(line.points) // 40)
    faint = dataclasses.replace(line, style=f"{line.style} faint")
    mean = Line(
        name=f"mean of {width} reports",
        points=smooth(line.points, width),
        style=line.style,
        read=False,
    )
    return [faint, mean]


def _find_marks(history: History) -> list[Mark]:
    times = "" if len(history.resumed) == 1 else f" ({len(history.resumed)} times)"
    return [
        Mark(f"resumed{times}", history.resumed, "resumed"),
        Mark("batch skipped", [read_step(row) for row in history.skips], "skipped"),
    ]


def _draw_small(history: History) -> Iterable[str]:
    for key, title, form, from_zero in (
        ("accuracy", "Chosen answer preferred, share of pairs", show_share, True),
        ("margin", "Margin of the chosen answer", show_figure, False),
        ("learning_rate", "Learning rate", show_figure, True),
        ("grad_norm", "Gradient norm", show_figure, False),
        ("tokens_per_second", "Trained tokens per second", show_count, True),
    ):
        lines = [Line("training", read_points(history.steps, key), "first")]
        validation = read_points(history.evals, key)
        if any(value is not None for _, value in validation):
            lines.append(Line("validation", validation, "second", dotted=True))
        yield draw(Chart(title, lines, history.last_step, form, (), from_zero), key)
    memory = [
        Line("held", read_points(history.steps, "memory_bytes"), "first"),
        Line("most in use", read_points(history.steps, "peak_memory_bytes"), "second"),
    ]
    lines = [line for line in memory if any(y is not None for _, y in line.points)]
    chart = Chart("Memory", lines, history.last_step, show_bytes, from_zero=True)
    yield draw(chart, "memory")


def _render_skipped(history: History) -> Iterable[str]:
    if not history.skips:
        return
    yield (
        "<section><h2>Skipped batches</h2><p>Their loss or gradient was not finite, so "
        "nothing was learnt from them.</p><ul>"
    )
    for row in history.skips[:MOST_SKIPPED]:
        samples = row.get("samples")
        names = [str(n) for n in samples] if isinstance(samples, list | tuple) else []
        shown = ", ".join(f"<code>{escape_text(name)}</code>" for name in names)
        yield f"<li>step {read_step(row):,.0f}: {shown or 'no samples on record'}</li>"
    if len(history.skips) > MOST_SKIPPED:
        yield f"<li>and {len(history.skips) - MOST_SKIPPED:,} more</li>"
    yield "</ul></section>"


def _render_samples(history: History) -> Iterable[str]:
    prompts: dict[str, list[Event]] = {}
    for row in history.samples:
        prompts.setdefault(str(row.get("prompt", "")), []).append(row)
    if not prompts:
        return
    yield "<section><h2>Samples</h2>"
    best = None if history.best is None else read_step(history.best)
    for prompt, rows in prompts.items():
        last = next((r for r in rows[1:] if read_step(r) == best), rows[-1])
        yield '<div class="pair">'
        for row in [rows[0]] if last is rows[0] else [rows[0], last]:
            yield _render_sample(prompt, row, best)
        yield "</div>"
    yield "</section>"


def _render_sample(prompt: str, row: Event, best: float | None) -> str:
    step = read_step(row)
    when = f"After {step:,.0f} steps" if step else "Before training"
    if step == best and step:
        when += ", the best"
    text = escape_text(str(row.get("text", "")))
    return (
        f"<figure><figcaption>{when}</figcaption><blockquote>"
        f"<b>{escape_text(prompt)}</b>{text}</blockquote></figure>"
    )


def _render_commands(commands: Sequence[tuple[str, str]]) -> Iterable[str]:
    if commands:
        yield "<section><h2>Use it</h2>"
        for what, line in commands:
            command = escape_text(line)
            yield f"<p>{escape_text(what)}</p><pre><code>{command}</code></pre>"
        yield "</section>"


def _render_recipe(recipe: str) -> Iterable[str]:
    if recipe:
        yield (
            "<section><h2>Recipe</h2><p>All options, resolved: saved as "
            "<code>recipe.yaml</code>, it runs the same again.</p>"
            f"<pre><code>{escape_text(recipe)}</code></pre></section>"
        )
