"""Tables of the report of a fine-tuning run: its metrics, and its data."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from mlx_openelm.finetuning.report_history import History, read_number, read_step
from mlx_openelm.finetuning.report_values import (
    escape_text,
    show_bytes,
    show_count,
    show_figure,
    show_share,
)

MOST_ROWS = 200  # of the table of metrics

# Metrics -----------------------------------------------------------------------

_COLUMNS: Sequence[tuple[str, str, Callable[[float], str]]] = (
    ("epoch", "epoch", lambda v: f"{v:.2f}"),
    ("loss", "loss", lambda v: f"{v:.4f}"),
    ("validation", "validation", lambda v: f"{v:.4f}"),
    ("accuracy", "accuracy", show_share),
    ("margin", "margin", show_figure),
    ("learning_rate", "learning rate", show_figure),
    ("grad_norm", "gradient norm", show_figure),
    ("tokens", "tokens", show_count),
    ("tokens_per_second", "tokens/s", show_count),
    ("memory_bytes", "memory", show_bytes),
    ("peak_memory_bytes", "peak", show_bytes),
    ("seconds", "seconds", lambda v: f"{v:,.1f}"),
)


def render_numbers(history: History) -> str:
    """Return the values of the charts as a table, for screen readers and copying."""
    rows: dict[float, dict[str, Any]] = {}
    for row in history.evals:
        rows[read_step(row)] = {
            "validation": row.get("loss"),
            "tokens": row.get("tokens"),
        }
    for row in history.steps:
        rows.setdefault(read_step(row), {}).update(row)
    steps = sorted(rows)
    every = math.ceil(len(steps) / MOST_ROWS)
    columns = [c for c in _COLUMNS if any(c[0] in row for row in rows.values())]
    head = "".join(f'<th scope="col">{title}</th>' for _, title, _ in columns)
    body = []
    for step in steps[::every]:
        values = [(read_number(rows[step], key), form) for key, _, form in columns]
        cells = "".join(
            f"<td>{'' if v is None else form(v)}</td>" for v, form in values
        )
        body.append(f'<tr><th scope="row">{step:,.0f}</th>{cells}</tr>')
    said = f", every {_ordinal(every)} step of metrics.jsonl" if every > 1 else ""
    return (
        f"<details><summary>The charts in numbers{said}</summary>"
        '<section class="wide" tabindex="0" aria-label="The numbers">'
        '<table class="numbers"><thead><tr><th scope="col">step</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></section></details>"
    )


def _ordinal(number: int) -> str:
    special = {1: "st", 2: "nd", 3: "rd"} if number % 100 // 10 != 1 else {}
    return f"{number}{special.get(number % 10, 'th')}"


# Data --------------------------------------------------------------------------

_FACTS = {  # of a split, in order; other facts follow
    "file": "file",
    "format": "format",
    "fields": "fields",
    "records": "records",
    "samples": "samples",
    "tokens": "tokens",
    "targets": "tokens that count",
    "lengths": "lengths in tokens",
    "shortest": "shortest",
    "median": "median",
    "longest": "longest",
    "cut": "cut at the end",
    "prompt_cut": "prompt cut",
    "nothing_to_learn": "nothing to learn",
    "spelt_eos": "with </s> in a text",
    "duplicates": "duplicates",
    "in_train": "in train too",
}


def render_data(data: Mapping[str, Any]) -> Iterable[str]:
    """Yield the HTML of the data: warnings, other facts, splits side by side."""
    splits = {name: facts for name, facts in data.items() if isinstance(facts, Mapping)}
    warnings = data.get("warnings") or ()
    rest = {
        name: value
        for name, value in data.items()
        if name not in (*splits, "warnings") and value is not None
    }
    if not data:
        return
    yield "<section><h2>Data</h2>"
    if isinstance(warnings, list | tuple) and warnings:
        yield "<ul>"
        yield from (f"<li>{escape_text(warning)}</li>" for warning in warnings)
        yield "</ul>"
    if rest:
        yield '<dl class="facts">'
        for name, value in rest.items():
            shown = escape_text(_show_value(name, value))
            yield f"<div><dt>{escape_text(_name(name))}</dt><dd>{shown}</dd></div>"
        yield "</dl>"
    if splits:
        yield from _render_splits(splits)
    yield "</section>"


def _render_splits(splits: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    there = dict.fromkeys(fact for facts in splits.values() for fact in facts)
    there.pop("edges", None)  # part of the lengths
    shown = [fact for fact in _FACTS if fact in there]
    shown += [fact for fact in there if fact not in _FACTS]
    head = "".join(f'<th scope="col">{escape_text(name)}</th>' for name in splits)
    yield f'<table class="data"><thead><tr><td></td>{head}</tr></thead><tbody>'
    for fact in shown:
        cells = "".join(f"<td>{_render_fact(s, fact)}</td>" for s in splits.values())
        name = escape_text(_FACTS.get(fact, _name(fact)))
        yield f'<tr><th scope="row">{name}</th>{cells}</tr>'
    yield "</tbody></table>"


def _render_fact(split: Mapping[str, Any], fact: str) -> str:
    bars = _read_histogram(split) if fact == "lengths" else []
    return _draw_bars(bars) if bars else escape_text(_show_value(fact, split.get(fact)))


def _read_histogram(split: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return ranges and counts of the lengths, if they are as in `SplitTable`."""
    edges, counts = split.get("edges"), split.get("lengths")
    if not (isinstance(edges, list | tuple) and isinstance(counts, list | tuple)):
        return []
    if len(edges) != len(counts) + 1 or not counts:
        return []
    if not all(isinstance(value, int) and value >= 0 for value in (*edges, *counts)):
        return []
    ranges = [f"{a + 1:,} to {b:,}" for a, b in pairwise(edges)]
    return list(zip(ranges, counts, strict=True))


def _name(key: object) -> str:
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


def _draw_bars(bars: Sequence[tuple[str, int]]) -> str:
    most, width = max(count for _, count in bars) or 1, 100 / len(bars)
    drawn = []
    for i, (label, count) in enumerate(bars):
        height = 100 * count / most
        drawn.append(
            f'<g><rect class="air" x="{i * width:.2f}%" y="0" width="{width:.2f}%" '
            f'height="100%"/><rect x="{i * width:.2f}%" y="{100 - height:.2f}%" '
            f'width="{width * 0.85:.2f}%" height="{height:.2f}%"/>'
            f"<title>{escape_text(label)}: {count:,.0f}</title></g>"
        )
    told = "; ".join(f"{label}: {count:,.0f}" for label, count in bars)
    first, last = bars[0][0].split(" ")[0], bars[-1][0].split(" ")[-1]
    return (
        f'<svg class="bars" role="img" aria-label="{escape_text(told)}">'
        f"{''.join(drawn)}</svg>"
        f'<span class="ends"><span>{first}</span><span>{last}</span></span>'
    )
