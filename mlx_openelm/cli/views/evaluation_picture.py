"""The scores of `evaluate` as a picture: one self-contained SVG file.

A dot for each score with its standard error, and a hollow one for the published score.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_openelm.cli.views.evaluation import is_share, show_value
from mlx_openelm.cli.views.svg import draw_line, draw_picture, shorten, write_text

if TYPE_CHECKING:
    from mlx_openelm.evaluation.results import ModelScores, SuiteScore
    from mlx_openelm.evaluation.suites import Suite

WIDTH, LEFT, RIGHT = 760, 220, 620  # where scores from 0 to 100 stand
LINE, LABEL, GAP = 18, 32, 12  # heights: of a dot's line, of a row's label


@dataclass(frozen=True, slots=True)
class _Dot:
    """A share in percent; `place` is the model's number."""

    place: int
    value: float
    stderr: float | None
    published: float | None


def draw_scores(scores: Sequence["ModelScores"], suite: "Suite | None") -> str:
    """Return the picture of all shares as an SVG document."""
    rows = _list_dots(scores, suite)
    tallest = max(len(scores) * LINE, LABEL) + GAP
    top = 64 + 20 * len(scores)
    bottom = top + tallest * len(rows)
    published = any(dot.published is not None for *_, dots in rows for dot in dots)
    feet = [
        "Percent. The thin line goes one standard error to each side.",
        *(["Hollow: published for this model."] if published else []),
        *_wrap(suite.notes if suite is not None else ()),
    ]
    height = bottom + 44 + 18 * len(feet)
    parts = [
        write_text(20, 30, f"Scores: {suite.name}" if suite else "Scores", "head"),
    ]
    for i, model in enumerate(scores):
        parts.append(f'<circle class="c{i % 6}" cx="26" cy="{51 + 20 * i}" r="5"/>')
        parts.append(write_text(40, 56 + 20 * i, shorten(model.card.name, 90), ""))
    for percent in range(0, 101, 20):
        x = _place(percent)
        parts.append(draw_line(x, top - 4, x, bottom, "axis"))
        parts.append(write_text(x, bottom + 16, str(percent), "muted middle"))
    for i, (name, label, dots) in enumerate(rows):
        y = top + tallest * i
        parts.append(write_text(20, y + 14, shorten(name, 28), "name"))
        parts.append(write_text(20, y + 28, shorten(label, 34), "muted"))
        for dot in dots:
            parts += _draw_dot(dot, y + LINE / 2 + LINE * dot.place)
    for i, foot in enumerate(feet):
        parts.append(write_text(20, bottom + 42 + 18 * i, foot, "muted"))
    return draw_picture(
        WIDTH, height, parts, title=_tell(scores, rows), palette=_PALETTE, style=_STYLE
    )


def _list_dots(
    scores: Sequence["ModelScores"], suite: "Suite | None"
) -> list[tuple[str, str, list[_Dot]]]:
    """Return a row for each column of a suite, else for each share of a task."""
    from mlx_openelm.evaluation.results import report_suite

    rows: dict[tuple[str, str], list[_Dot]] = {}
    for place, model in enumerate(scores):
        if suite is not None:
            report = report_suite(suite, model.card, model.tasks)
            for score in (*report.scores, *report.averages):
                if score.value is not None:
                    dot = _Dot(place, score.value, score.stderr, score.published)
                    rows.setdefault((score.column, _label(score)), []).append(dot)
            continue
        for result in model.tasks:
            for name, metric in result.metrics.items():
                if is_share(metric):
                    stderr = None if metric.stderr is None else 100 * metric.stderr
                    shots = (
                        f"{result.num_fewshot} shots, " if result.num_fewshot else ""
                    )
                    label = f"{name}, {shots}n = {result.n:,}"
                    dot = _Dot(place, 100 * metric.value, stderr, None)
                    rows.setdefault((result.task, label), []).append(dot)
    return [(name, label, dots) for (name, label), dots in rows.items()]


def _label(score: "SuiteScore") -> str:
    if score.task is None:
        return ""
    return f"{score.task.metric}, {score.task.num_fewshot} shots, n = {score.n or 0:,}"


def _draw_dot(dot: _Dot, y: float) -> Iterator[str]:
    x, style = _place(dot.value), f"c{dot.place % 6}"
    if dot.stderr is not None:
        ends = [_place(dot.value + sign * dot.stderr) for sign in (-1, 1)]
        yield draw_line(ends[0], y, ends[1], y, f"spread {style}")
    if dot.published is not None:
        at = _place(dot.published)
        yield f'<circle class="hollow {style}" cx="{at:.1f}" cy="{y:.1f}" r="5.5"/>'
    yield f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    yield write_text(RIGHT + 16, y + 5, show_value(dot.value, dot.stderr), "value")


def _place(percent: float) -> float:
    return LEFT + (RIGHT - LEFT) * min(max(percent, 0.0), 100.0) / 100


def _tell(
    scores: Sequence["ModelScores"], rows: Sequence[tuple[str, str, Sequence[_Dot]]]
) -> str:
    """Return the picture's text alternative."""
    said = [
        f"{scores[dot.place].card.name} in {name} ({label or 'percent'}): "
        f"{show_value(dot.value, dot.stderr)}"
        for name, label, dots in rows
        for dot in dots
    ]
    return "; ".join(said) or "No share was measured"


def _wrap(notes: Sequence[str]) -> list[str]:
    import textwrap

    return [line for note in notes for line in textwrap.wrap(note, 105)]


_PALETTE = """
svg { --page: #ffffff; --text: #1b1f24; --muted: #57606a; --rule: #d9dde2;
  --c0: #1f66b5; --c1: #b8480b; --c2: #1a7f37; --c3: #8250df; --c4: #9a6700;
  --c5: #bf3989; }
@media (prefers-color-scheme: dark) {
  svg { --page: #14171b; --text: #e4e8ed; --muted: #9ba6b2; --rule: #3a414a;
    --c0: #6cb0ff; --c1: #ff9a55; --c2: #57c878; --c3: #b392f0; --c4: #d9a520;
    --c5: #f778ba; }
}
"""
_STYLE = """\
.muted { fill: var(--muted); font-size: 12px; }
.middle { text-anchor: middle; }
.value { font-size: 12px; }
.axis { stroke: var(--rule); }
.spread { stroke-width: 1.5; }
.c0 { fill: var(--c0); stroke: var(--c0); } .c1 { fill: var(--c1); stroke: var(--c1); }
.c2 { fill: var(--c2); stroke: var(--c2); } .c3 { fill: var(--c3); stroke: var(--c3); }
.c4 { fill: var(--c4); stroke: var(--c4); } .c5 { fill: var(--c5); stroke: var(--c5); }
.hollow { fill: var(--page); stroke-width: 1.5; }
"""
