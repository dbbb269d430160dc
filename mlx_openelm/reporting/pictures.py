"""Pictures of measured speeds and of scores, each a self-contained SVG file."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_openelm.reporting.drawing import (
    COLOR,
    add_axes,
    css_class,
    new_figure,
    to_markup,
    write_text,
)
from mlx_openelm.reporting.rendering import printable, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAD: Any = {"fontsize": 18, "fontweight": "semibold"}
NAME: Any = {"fontsize": 13, "fontweight": "semibold"}
MUTED: Any = {"fontsize": 12, "color": COLOR["muted"]}
FOOT_LINE = 18  # height of a line of a note


def finish(figure: "Figure", top: float, notes: Sequence[str], description: str) -> str:
    """Write the notes below, and return the SVG document."""
    for i, note in enumerate(notes):
        write_text(figure, 20, top + FOOT_LINE * i, note, **MUTED)
    width, height = (round(size * 72) for size in figure.get_size_inches())
    markup = to_markup(figure, "picture")
    return render(
        "picture.svg",
        width=width,
        height=height,
        description=description,
        markup=markup,
    )


def _set_rows(axes: "Axes", count: int) -> None:
    """Number the rows of the vertical axis from the top."""
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


# Speeds --------------------------------------------------------------------------

SPEED_WIDTH, SPEED_ROW, SPEED_TOP = 960, 40, 92
SPEED_AREA, SHARE_AREA = (300, 300), (690, 190)  # left and width
VALUE_WIDTH = 50  # of a number beside a bar


@dataclass(frozen=True, slots=True)
class Measure:
    """A median with its least and largest value, and how it is written."""

    median: float
    low: float
    high: float
    text: str


SPEED = "new tokens per second"


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """A measured case; without `speed`, the note says why."""

    name: str
    label: str
    speed: Measure | None = None
    bandwidth_share: Measure | None = None
    published_speed: float | None = None
    note: str = ""


def draw_speeds(
    rows: Sequence[SpeedRow],
    *,
    title: str,
    subtitle: str,
    notes: Sequence[str],
    unit: str = SPEED,
) -> str:
    """Return bars for tokens per second and for the share of the bandwidth.

    Args:
        unit: of `SpeedRow.speed`.
    """
    bottom = SPEED_TOP + SPEED_ROW * len(rows)
    height = bottom + 60 + FOOT_LINE * len(notes)
    with new_figure(SPEED_WIDTH, height) as figure:
        write_text(figure, 20, 34, title, **HEAD)
        write_text(figure, 20, 54, subtitle, **MUTED)
        for i, row in enumerate(rows):
            y = SPEED_TOP + SPEED_ROW * (i + 0.5)
            write_text(figure, 20, y - 3, _shorten(row.name, 32), **NAME)
            write_text(figure, 20, y + 13, row.label, **MUTED)
        published = [row.published_speed for row in rows]
        axes = _add_bars(
            *(figure, SPEED_AREA, unit, "blue"),
            measures=[row.speed for row in rows],
            published=published,
            form="{:,.0f}".format,
        )
        for i, row in enumerate(rows):
            if row.speed is None:
                start = row.published_speed or 0
                _write_beside(axes, start, i, _shorten(row.note, 80), **MUTED)
        shares = [row.bandwidth_share for row in rows]
        if unit == SPEED or any(shares):
            _add_bars(
                *(figure, SHARE_AREA, "share of the memory bandwidth", "orange"),
                measures=shares,
                published=[None] * len(rows),
                form=format_percent,
                least=1.0,
            )
        description = "; ".join(_describe_speeds(rows)) or "Nothing was measured"
        return finish(figure, bottom + 46, notes, description)


def format_percent(share: float) -> str:
    """Return a share in whole percent."""
    return f"{100 * share:.0f} %"


def _add_bars(
    figure: "Figure",
    area: tuple[int, int],
    heading: str,
    color: str,
    *,
    measures: Sequence[Measure | None],
    published: Sequence[float | None],
    form: Callable[[float], str],
    least: float = 0.0,
) -> "Axes":
    """Add an area with a bar for each measure, and marks of published values.

    Args:
        least: smallest allowed end of the axis.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    (left, width), count = area, len(measures) or 1
    write_text(figure, left, SPEED_TOP - 10, heading, **MUTED)
    axes = add_axes(figure, left, SPEED_TOP, width, SPEED_ROW * count)
    _set_rows(axes, count)
    ends = [m.high for m in measures if m is not None]
    largest = max([least, *ends, *(p for p in published if p is not None)]) or 1.0
    axes.set_xlim(0, largest)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 2.5, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    for i, (measure, mark) in enumerate(zip(measures, published, strict=True)):
        if mark is not None:
            axes.vlines(
                *(mark, i - 0.4, i + 0.4),
                *(COLOR["text"], (0, (2, 2))),
                linewidth=2,
                gid=css_class("published"),
            )
        if measure is None:
            continue
        axes.barh(
            *(i, measure.median, 0.42),
            color=COLOR[color],
            gid=css_class(f"bar {color}"),
        )
        if measure.low < measure.high:
            axes.hlines(i, measure.low, measure.high, COLOR["text"], linewidth=1.5)
        end = measure.high
        if mark is not None and 0 < mark - end < largest * VALUE_WIDTH / width:
            end = mark  # so that the mark does not cross the number
        _write_beside(axes, end, i, measure.text, fontweight="semibold")
    return axes


def _write_beside(axes: "Axes", x: float, row: int, text: str, **style: Any) -> None:
    """Write a text to the right of a value."""
    axes.annotate(
        printable(text),
        (x, row),
        xytext=(7, 0),
        textcoords="offset points",
        va="center_baseline",
        **style,
    )


def _describe_speeds(rows: Sequence[SpeedRow]) -> Iterator[str]:
    for row in rows:
        if row.speed is not None and row.bandwidth_share is not None:
            yield (
                f"{row.name}, {row.label}: {row.speed.text} new tokens per second, "
                f"{row.bandwidth_share.text} of the memory bandwidth"
            )


# Scores --------------------------------------------------------------------------

SCORE_WIDTH, SCORE_AREA = 760, (230, 400)  # the area: left and width
SCORE_LINE, SCORE_LABEL, SCORE_GAP = 18, 32, 12  # heights: of a dot, a label, a gap
SERIES_COLORS = ("blue", "orange", "green", "purple", "brown", "pink")


@dataclass(frozen=True, slots=True)
class Score:
    """A percentage of the model with this number, and how it is written."""

    model: int
    value: float
    stderr: float | None
    published: float | None
    text: str


@dataclass(frozen=True, slots=True)
class ScoreRow:
    name: str
    label: str
    scores: Sequence[Score]


def draw_scores(
    models: Sequence[str],
    rows: Sequence[ScoreRow],
    *,
    title: str,
    notes: Sequence[str],
) -> str:
    """Return dots from 0 to 100 percent, hollow ones for published scores."""
    step = max(len(models) * SCORE_LINE, SCORE_LABEL) + SCORE_GAP
    top = 64 + 20 * len(models)
    bottom = top + step * len(rows)
    lines = [line for note in notes for line in textwrap.wrap(note, 105)]
    height = bottom + 56 + FOOT_LINE * len(lines)
    with new_figure(SCORE_WIDTH, height) as figure:
        write_text(figure, 20, 34, title, **HEAD)
        for i, model in enumerate(models):
            write_text(figure, 20, 57 + 20 * i, "\N{BLACK CIRCLE}", color=_color(i))
            write_text(figure, 38, 57 + 20 * i, _shorten(model, 90))
        for i, row in enumerate(rows):
            above = top + step * i
            write_text(figure, 20, above + 14, _shorten(row.name, 25), **NAME)
            write_text(figure, 20, above + 29, _shorten(row.label, 32), **MUTED)
        left, width = SCORE_AREA
        axes = add_axes(figure, left, top, width, bottom - top or 1)
        axes.set_xlim(0, 100)
        axes.set_xticks(range(0, 101, 20))
        _set_rows(axes, len(rows) or 1)
        for i, row in enumerate(rows):
            for score in row.scores:
                y = i - 0.5 + SCORE_LINE * (score.model + 0.5) / step
                _draw_score(axes, score, y)
        description = "; ".join(_describe_scores(models, rows))
        return finish(
            figure, bottom + 44, lines, description or "No share was measured"
        )


def _draw_score(axes: "Axes", score: Score, y: float) -> None:
    color = _color(score.model)
    axes.errorbar(score.value, y, xerr=score.stderr, fmt="o", color=color, markersize=8)
    if score.published is not None:
        axes.plot(
            *([score.published], [y], "o"),
            color=color,
            markersize=10,
            markerfacecolor=COLOR["page"],
            markeredgewidth=1.5,
            zorder=1.5,
            gid=css_class("published"),
        )
    axes.annotate(
        score.text,
        (100, y),
        xytext=(16, 0),
        textcoords="offset points",
        va="center_baseline",
    )


def _color(model: int) -> str:
    return COLOR[SERIES_COLORS[model % len(SERIES_COLORS)]]


def _describe_scores(models: Sequence[str], rows: Sequence[ScoreRow]) -> Iterator[str]:
    for row in rows:
        for score in row.scores:
            yield (
                f"{models[score.model]} in {row.name} ({row.label or 'percent'}): "
                f"{score.text}"
            )
