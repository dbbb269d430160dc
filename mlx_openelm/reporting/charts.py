"""Line charts over training steps, readable at any width, with values on hover."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import numpy as np

from mlx_openelm.reporting.drawing import (
    COLOR,
    add_axes,
    css_class,
    new_figure,
    to_markup,
)

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

SMALL, LARGE = (400, 240), (940, 380)  # width and height in CSS pixels
MAX_DOTS = 60  # a line with more points has none
TREND_FROM = 60  # a line with more points also gets its running mean
ROUND_STEPS = (1, 2, 2.5, 5, 10)  # between ticks
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 22, 40  # margins around the plotting area

Point = tuple[float, float | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """Values over steps.

    Attributes:
        points: by step; None leaves a gap.
        color: a name in `rendering.COLORS`.
        dotted: draw a dot for each point.
        trend: with many points, draw it faint, with its running mean.
        best: the step that gets a ring and a label.
        hover: show its values on hover.
    """

    name: str
    points: Sequence[Point]
    color: str
    dotted: bool = False
    trend: bool = False
    faint: bool = False
    best: float | None = None
    hover: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """Steps at which something happened: vertical lines, dashed or dotted."""

    name: str
    steps: Sequence[float]
    color: str
    dashes: str


@dataclasses.dataclass(frozen=True, slots=True)
class Chart:
    """Lines over the same steps.

    `from_zero` starts the axis at 0; without it, values over more than two decades
    are drawn on a logarithmic axis.
    """

    name: str  # an id
    title: str
    lines: Sequence[Line]
    last_step: float
    format: Callable[[float], str]
    marks: Sequence[Mark] = ()
    from_zero: bool = False

    @property
    def values(self) -> list[float]:
        return [y for line in self.lines for _, y in line.points if y is not None]

    @property
    def logarithmic(self) -> bool:
        low, high = min(self.values), max(self.values)
        return not self.from_zero and low > 1e-300 and high / low > 100


@dataclasses.dataclass(frozen=True, slots=True)
class HoverBand:
    """A part of the plotting area, and what is shown while the pointer is over it."""

    left: float
    width: float
    x: float
    text: str
    dots: Sequence[tuple[float, float, str]]  # x, y, colour


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """A chart drawn at one size."""

    width: int
    height: int
    markup: "Markup"
    bands: Sequence[HoverBand]
    top: float = TOP
    bottom: float = BOTTOM
    right: float = RIGHT


@dataclasses.dataclass(frozen=True, slots=True)
class DrawnChart:
    """A chart as input of the template.

    Attributes:
        legend: name, colour and kind of line; empty if the title is enough.
        views: the sizes; the page shows the one that fits.
    """

    name: str
    title: str
    description: str
    legend: Sequence[tuple[str, str, str]]
    views: Sequence[View]


def draw_chart(chart: Chart, sizes: Sequence[tuple[int, int]] = (SMALL,)) -> DrawnChart:
    """Draw a chart that has at least one value."""
    lines = [part for line in chart.lines for part in _with_trend(line)]
    chart = dataclasses.replace(chart, lines=lines)
    return DrawnChart(
        name=chart.name,
        title=chart.title + (" (logarithmic axis)" if chart.logarithmic else ""),
        description=_describe(chart),
        legend=_list_legend(chart),
        views=[_draw_view(chart, width, height) for width, height in sizes],
    )


# Drawing -------------------------------------------------------------------------


def _draw_view(chart: Chart, width: int, height: int) -> View:
    with new_figure(width, height) as figure:
        axes = add_axes(figure, LEFT, TOP, width - LEFT - RIGHT, height - TOP - BOTTOM)
        for line in chart.lines:
            points = thin_out(line.points, most=width)
            _draw_line(axes, dataclasses.replace(line, points=points))
        _set_axes(axes, chart)
        for mark in chart.marks:
            axes.vlines(
                list(mark.steps),
                *(0, 1),
                transform=axes.get_xaxis_transform(),
                color=COLOR[mark.color],
                linestyle=mark.dashes,
                gid=css_class("mark"),
            )
        for line in chart.lines:
            _label_best(axes, line, chart.format)
        bands = list(_find_bands(chart, axes, height, most=width // 8))
        return View(width, height, to_markup(figure, f"{chart.name}-{width}"), bands)


def _set_axes(axes: "Axes", chart: Chart) -> None:
    """Set limits, ticks and labels, after the lines are drawn."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.set_xlim(0, max(chart.last_step, 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND_STEPS, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("step", loc="right", fontstyle="italic", color=COLOR["muted"])
    if chart.logarithmic:
        bottom = math.floor(math.log10(min(chart.values)))
        top = math.ceil(math.log10(max(chart.values)))
        axes.set_ylim(10.0**bottom, 10.0**top)
        axes.set_yscale("log")
        every = math.ceil((top - bottom) / 6)
        axes.set_yticks([10.0**n for n in range(bottom, top + 1, every)])
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.margins(y=0.06)
        low, high = axes.get_ylim()
        axes.set_ylim(0 if chart.from_zero and min(chart.values) >= 0 else low, high)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: chart.format(value)))


def _draw_line(axes: "Axes", line: Line) -> None:
    """Draw the line, and dots where no line joins the values."""
    color, style = COLOR[line.color], f"line {line.color}"
    axes.plot(
        [step for step, _ in line.points],
        [math.nan if value is None else value for _, value in line.points],
        color=color,
        linewidth=1 if line.faint else 2,
        alpha=0.45 if line.faint else 1,
        solid_joinstyle="round",
        solid_capstyle="round",
        gid=css_class(f"{style} faint" if line.faint else style),
    )
    runs = _split_at_gaps(line.points)
    few = line.dotted and sum(map(len, runs)) <= MAX_DOTS
    dots = [point for run in runs for point in run if few or len(run) == 1]
    if dots:
        steps, values = zip(*dots, strict=True)
        axes.plot(steps, values, "o", color=color, markersize=6, gid=css_class("dots"))


def _label_best(axes: "Axes", line: Line, form: Callable[[float], str]) -> None:
    for step, value in line.points:
        if step != line.best or value is None:
            continue
        axes.plot(
            *([step], [value], "o"),
            color=COLOR[line.color],
            markersize=13,
            markerfacecolor="none",
            markeredgewidth=2,
            gid=css_class("ring"),
        )
        across, up = axes.transLimits.transform(
            axes.transScale.transform((step, value))
        )
        axes.annotate(
            f"best: {form(value)} at step {step:,.0f}",
            (step, value),
            xytext=(0, 14 if up < 0.8 else -24),
            textcoords="offset points",
            ha="left" if across < 0.3 else "right" if across > 0.7 else "center",
            fontweight="semibold",
            gid=css_class("best"),
        )


def _split_at_gaps(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    runs = groupby(points, lambda point: point[1] is not None)
    return [
        [(step, value) for step, value in run if value is not None]
        for known, run in runs
        if known
    ]


# Hover ---------------------------------------------------------------------------


def _find_bands(
    chart: Chart, axes: "Axes", height: int, most: int
) -> Iterable[HoverBand]:
    """Yield bands that cover the plotting area, each with the values of its step."""
    lines = [line for line in chart.lines if line.hover]
    marks = [(mark.name, step) for mark in chart.marks for step in mark.steps[:20]]
    steps = _choose_steps(lines, marks, most)

    def place(step: float, value: float) -> tuple[float, float]:
        x, y = axes.transData.transform((step, value))
        return float(x), height - float(y)

    first, last = (place(step, axes.get_ylim()[0])[0] for step in axes.get_xlim())
    at = [place(step, axes.get_ylim()[0])[0] for step in steps]
    edges = [first, *((a + b) / 2 for a, b in pairwise(at)), last]
    for i, step in enumerate(steps):
        words, dots = [f"step {step:,.0f}"], []
        for line in lines:
            for _, value in (point for point in line.points if point[0] == step):
                shown = "not finite" if value is None else chart.format(value)
                words.append(f"{line.name} {shown}")
                if value is not None:
                    dots.append((*place(step, value), line.color))
        words += [name for name, marked in marks if marked == step]
        width = edges[i + 1] - edges[i]
        yield HoverBand(edges[i], width, at[i], " · ".join(words), dots)


def _choose_steps(
    lines: Sequence[Line], marks: Sequence[tuple[str, float]], most: int
) -> list[float]:
    """Choose all steps of lines with few points, and of the others every n-th."""
    chosen = {step for _, step in marks}
    for line in lines:
        every = math.ceil(len(line.points) / most) or 1
        chosen.update(step for step, _ in line.points[::every])
        chosen.update(step for step, _ in line.points if step == line.best)
    return sorted(chosen)


# Words ---------------------------------------------------------------------------


def _list_legend(chart: Chart) -> list[tuple[str, str, str]]:
    entries = [
        (line.name, line.color, "faint" if line.faint else "") for line in chart.lines
    ]
    entries = entries if len(entries) > 1 else []  # else the title names it
    return entries + [(m.name, m.color, m.dashes) for m in chart.marks if m.steps]


def _describe(chart: Chart) -> str:
    """Return each line's first, last, least and largest value, for screen readers."""
    sentences = []
    for line in chart.lines:
        known = [(step, value) for step, value in line.points if value is not None]
        if not line.hover or not known:
            continue
        (first, a), (last, b) = known[0], known[-1]
        values = [value for _, value in known]
        sentences.append(
            f"{line.name}: {chart.format(a)} at step {first:,.0f}, {chart.format(b)} "
            f"at step {last:,.0f}, between {chart.format(min(values))} and "
            f"{chart.format(max(values))}."
        )
    for mark in chart.marks:
        if mark.steps:
            steps = ", ".join(f"{step:,.0f}" for step in mark.steps[:20])
            sentences.append(f"{mark.name}: at step {steps}.")
    return " ".join(sentences)


# Points --------------------------------------------------------------------------


def thin_out(points: Sequence[Point], most: int) -> Sequence[Point]:
    """Keep of each stretch of points the least, the largest and a gap, and the ends."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / ((most - 2) // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        known = {y: i for i in stretch if (y := points[i][1]) is not None}
        kept.update(known[extreme(known)] for extreme in (min, max) if known)
        kept.update([i for i in stretch if points[i][1] is None][:1])
    return [points[i] for i in sorted(kept)]


def _with_trend(line: Line) -> list[Line]:
    """Return the line, or a faint one and its running mean."""
    if not line.trend or len(line.points) < TREND_FROM:
        return [line]
    width = max(5, len(line.points) // 40)
    mean = dataclasses.replace(
        line,
        name=f"mean of {width} reports",
        points=running_mean(line.points, width),
        hover=False,
    )
    return [dataclasses.replace(line, faint=True), mean]


def running_mean(points: Sequence[Point], width: int) -> list[Point]:
    """Return the mean of the known values among `width` points around each."""
    known = np.array([value is not None for _, value in points])
    values = np.array([value or 0.0 for _, value in points])
    counts = np.convolve(known, np.ones(width), "same")
    means = np.convolve(values, np.ones(width), "same") / np.maximum(counts, 1)
    return [
        (step, float(mean) if value is not None else None)
        for (step, value), mean in zip(points, means, strict=True)
    ]
