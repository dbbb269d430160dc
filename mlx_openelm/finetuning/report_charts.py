"""Line charts as inline SVG: no script, nothing to load, any width and colour scheme.

The <svg> is the plotting area itself. What has a place on the page (text, dots, marks)
stands at percentages of it, so that it keeps its size at every width; only the lines
lie in an inner picture that is stretched. Labels stand outside, where CSS leaves room.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise

from mlx_openelm.finetuning.report_values import escape_text

MOST_POINTS = 1000  # in one line
MOST_DOTS = 60  # a line with more has none
MOST_STOPS = 120  # places where the pointer reads values

Point = tuple[float, float | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """Values over steps. `style` is a CSS class: its colour and strength."""

    name: str
    points: Sequence[Point]  # by step; None leaves a gap
    style: str
    dotted: bool = False
    best: int | None = None  # the step that gets a ring and a label
    read: bool = True  # by the pointer


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """Steps at which something happened. `style` is a CSS class."""

    name: str
    steps: Sequence[float]
    style: str


@dataclasses.dataclass(frozen=True, slots=True)
class Chart:
    """Lines over the same steps.

    `from_zero` lets the axis begin at 0; without it, values over more than two decades
    are drawn on a logarithmic axis.
    """

    title: str
    lines: Sequence[Line]
    last_step: float
    format: Callable[[float], str]
    marks: Sequence[Mark] = ()
    from_zero: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """Where a value stands, from 0 to 100, and the values that are written beside."""

    low: float
    high: float
    ticks: Sequence[float]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return 100 * (value - low) / (high - low)


# The chart -----------------------------------------------------------------------


def draw(chart: Chart, name: str) -> str:
    """Return a <figure>, its ids made unique by `name`; empty without a value."""
    values = [y for line in chart.lines for _, y in line.points if y is not None]
    if not values:
        return ""
    x = span_axis(0, max(chart.last_step, 1), count=5, whole=True)
    y = choose_axis(values, from_zero=chart.from_zero)
    lines = [
        dataclasses.replace(line, points=thin_out(line.points)) for line in chart.lines
    ]
    title = chart.title + (" (logarithmic axis)" if y.logarithmic else "")
    parts = [
        f'<figure class="chart" id="{name}">',
        f'<figcaption><span class="title">{escape_text(title)}</span>',
        f"{_draw_legend(chart)}</figcaption>",
        f'<svg role="img" aria-labelledby="{name}-title {name}-desc">',
        f'<title id="{name}-title">{escape_text(title)}</title>',
        f'<desc id="{name}-desc">{escape_text(_describe(chart))}</desc>',
        *_draw_axes(x, y, chart.format),
        *(part for mark in chart.marks for part in _draw_mark(mark, x)),
        '<svg class="lines" width="100%" height="100%" viewBox="0 0 1000 1000" '
        'preserveAspectRatio="none" aria-hidden="true">',
        *(_draw_line(line, x, y) for line in lines),
        "</svg>",
        *(part for line in lines for part in _draw_dots(line, x, y)),
        *_draw_stops(lines, x, y, chart.format),
        *(part for line in lines for part in _draw_best(line, x, y, chart.format)),
        "</svg></figure>",
    ]
    return "\n".join(part for part in parts if part)


def _draw_legend(chart: Chart) -> str:
    entries = [(line.name, line.style) for line in chart.lines]
    entries = entries if len(entries) > 1 else []  # else the title says it
    entries += [(mark.name, mark.style) for mark in chart.marks if mark.steps]
    return "".join(
        f'<span class="key"><i class="{style}"></i>{escape_text(name)}</span>'
        for name, style in entries
    )


def _describe(chart: Chart) -> str:
    """Say a chart in words: each line's first, last, least and largest value."""
    said = []
    for line in chart.lines:
        known = [(step, value) for step, value in line.points if value is not None]
        if not line.read or not known:
            continue
        (first, a), (last, b) = known[0], known[-1]
        values = [value for _, value in known]
        said.append(
            f"{line.name}: {chart.format(a)} at step {first:,.0f}, {chart.format(b)} "
            f"at step {last:,.0f}, between {chart.format(min(values))} and "
            f"{chart.format(max(values))}."
        )
    for mark in chart.marks:
        if mark.steps:
            steps = ", ".join(f"{step:,.0f}" for step in mark.steps[:20])
            said.append(f"{mark.name}: at step {steps}.")
    return " ".join(said)


def _draw_axes(x: Axis, y: Axis, form: Callable[[float], str]) -> Iterable[str]:
    for value in y.ticks:
        at = f"{100 - y.place(value):.2f}%"
        yield f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>'
        label = escape_text(form(value))
        yield f'<text class="y" x="-8" y="{at}" dy=".35em">{label}</text>'
    for value in x.ticks:
        at = f"{x.place(value):.2f}%"
        yield f'<line class="tick" x1="{at}" x2="{at}" y1="100%" y2="100%"/>'
        yield f'<text class="x" x="{at}" y="100%" dy="1.5em">{value:,.0f}</text>'
    yield '<text class="x name" x="100%" y="100%" dy="2.8em">step</text>'
    yield '<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>'


def _draw_mark(mark: Mark, x: Axis) -> Iterable[str]:
    for step in mark.steps:
        at = f"{x.place(step):.2f}%"
        yield (
            f'<line class="mark {mark.style}" x1="{at}" x2="{at}" y1="0" y2="100%">'
            f"<title>{escape_text(mark.name)}, step {step:,.0f}</title></line>"
        )


def _draw_line(line: Line, x: Axis, y: Axis) -> str:
    """Draw each stretch between two gaps."""
    drawn = []
    for stretch in _find_stretches(line.points):
        places = [
            f"{10 * x.place(step):.1f},{1000 - 10 * y.place(value):.1f}"
            for step, value in stretch
        ]
        drawn.append(f'<polyline class="{line.style}" points="{" ".join(places)}"/>')
    return "".join(drawn)


def _draw_dots(line: Line, x: Axis, y: Axis) -> Iterable[str]:
    """Draw the values that no line joins, or all of them."""
    stretches = _find_stretches(line.points)
    few = line.dotted and sum(map(len, stretches)) <= MOST_DOTS
    for stretch in stretches:
        for step, value in stretch if few or len(stretch) == 1 else ():
            yield _draw_dot(f"dot {line.style}", 3.5, x.place(step), y.place(value))


def _find_stretches(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """Return the points between gaps."""
    stretches = groupby(points, lambda point: point[1] is not None)
    return [
        [(step, value) for step, value in stretch if value is not None]
        for known, stretch in stretches
        if known
    ]


def _draw_best(
    line: Line, x: Axis, y: Axis, form: Callable[[float], str]
) -> Iterable[str]:
    for step, value in line.points:
        if step == line.best and value is not None:
            across, up = x.place(step), y.place(value)
            yield _draw_dot(f"ring {line.style}", 7, across, up)
            side = "start" if across < 30 else "end" if across > 70 else "middle"
            dy = "-1.1em" if up < 80 else "2em"
            label = f"best: {escape_text(form(value))} at step {step:,.0f}"
            yield (
                f'<text class="best" x="{across:.2f}%" y="{100 - up:.2f}%" dy="{dy}" '
                f'text-anchor="{side}">{label}</text>'
            )


def _draw_stops(
    lines: Sequence[Line], x: Axis, y: Axis, form: Callable[[float], str]
) -> Iterable[str]:
    """Draw the bands that show their values, above the chart, under the pointer."""
    told = [line for line in lines if line.read]
    steps = _choose_stops(told)
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(steps)), x.high]
    for i, step in enumerate(steps):
        left, right = x.place(edges[i]), x.place(edges[i + 1])
        at = x.place(step)
        words, dots = [f"step {step:,.0f}"], []
        for line in told:
            for _, value in (point for point in line.points if point[0] == step):
                words.append(
                    f"{line.name} {form(value) if value is not None else 'not finite'}"
                )
                if value is not None:
                    dots.append(_draw_dot(f"dot {line.style}", 4.5, at, y.place(value)))
        yield (
            f'<g class="stop"><rect x="{left:.2f}%" y="0" width="{right - left:.2f}%" '
            f'height="100%"/><g><line x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="100%"/>'
            f'{"".join(dots)}<text x="100%" y="-8">'
            f"{escape_text(' · '.join(words))}</text></g></g>"
        )


def _choose_stops(lines: Sequence[Line]) -> list[float]:
    """Choose all steps of lines with few points, and of the others every n-th."""
    chosen: set[float] = set()
    for line in lines:
        every = math.ceil(len(line.points) / MOST_STOPS) or 1
        chosen.update(step for step, _ in line.points[::every])
        chosen.update(step for step, _ in line.points if step == line.best)
    return sorted(chosen)


def _draw_dot(style: str, radius: float, across: float, up: float) -> str:
    place = f'cx="{across:.2f}%" cy="{100 - up:.2f}%"'
    return f'<circle class="{style}" {place} r="{radius}"/>'


# Axes ----------------------------------------------------------------------------


def choose_axis(values: Sequence[float], *, from_zero: bool) -> Axis:
    """Choose an axis that shows all values, with some air around them."""
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    elif low > 0 and high / low > 100:
        return _span_decades(low, high)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        air = abs(high) / 10 or 1.0
        low, high = (low if from_zero and low == 0 else low - air), high + air
    air = (high - low) * 0.06
    return span_axis(low if from_zero and low == 0 else low - air, high + air)


def span_axis(low: float, high: float, *, count: int = 5, whole: bool = False) -> Axis:
    """Return the axis from low to high with about `count` round values."""
    rough = (high - low) / count
    decade = 10.0 ** math.floor(math.log10(rough))
    width = next(f * decade for f in (1, 2, 2.5, 5, 10) if f * decade >= rough * 0.999)
    if whole:
        width = max(1.0, math.floor(width))
    first, last = math.ceil(low / width), math.floor(high / width)
    return Axis(low, high, [n * width for n in range(first, last + 1)])


def _span_decades(low: float, high: float) -> Axis:
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = math.ceil((top - bottom) / 6)
    ticks = [10.0**n for n in range(bottom, top + 1, every)]
    return Axis(10.0**bottom, 10.0**top, ticks, logarithmic=True)


# Points --------------------------------------------------------------------------


def thin_out(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """Keep of each stretch of points the least and the largest, so peaks stay.

    The first and the last point stay, and so does a gap.
    """
    if len(points) <= most:
        return points
    size = math.ceil((len(points) - 2) / ((most - 2) // 2))  # two of each stretch
    kept: list[Point] = [points[0]]
    for start in range(1, len(points) - 1, size):
        stretch = points[start : min(start + size, len(points) - 1)]
        known = [
            (value, i) for i, (_, value) in enumerate(stretch) if value is not None
        ]
        gap = [i for i, (_, value) in enumerate(stretch) if value is None][:1]
        peaks = [min(known)[1], max(known)[1]] if known else []
        kept += [stretch[i] for i in sorted({*peaks, *gap})]
    return [*kept, points[-1]]


def smooth(points: Sequence[Point], width: int) -> list[Point]:
    """Return the mean of the known values among `width` points around each."""
    sums, counts = [0.0], [0]
    for _, value in points:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    smoothed: list[Point] = []
    for i, (step, value) in enumerate(points):
        start, stop = max(0, i - width // 2), min(len(points), i + width // 2 + 1)
        count = counts[stop] - counts[start]
        known = value is not None and count > 0
        mean = (sums[stop] - sums[start]) / count if known else None
        smoothed.append((step, mean))
    return smoothed


# How it looks --------------------------------------------------------------------

CHART_STYLE = """
.chart { margin: 0; padding: 0 0.75rem 2.9rem 3.6rem; min-width: 0; }
.chart figcaption { margin: 0 0 1.7rem -3.6rem; display: flex; flex-wrap: wrap;
  gap: 0.15rem 1rem; align-items: baseline; }
.chart .title { font-weight: 600; }
.key { color: var(--muted); font-size: 0.85rem; white-space: nowrap; }
.key i { display: inline-block; width: 1.3em; height: 0; margin-right: 0.4em;
  vertical-align: middle; border-top: 3px solid var(--line); }
.key i.faint { opacity: 0.6; border-top-width: 1px; }
.key i.resumed { border-top: 2px dashed var(--line); }
.key i.skipped { border-top: 2px dotted var(--line); }
.chart > svg { display: block; width: 100%; height: 170px; overflow: visible;
  font-size: 12px; }
.chart.large > svg { height: 320px; }
.chart text { fill: var(--muted); }
.chart text.y { text-anchor: end; }
.chart text.x { text-anchor: middle; }
.chart text.name { text-anchor: end; font-style: italic; }
.chart text.best { fill: var(--text); font-weight: 600; pointer-events: none;
  paint-order: stroke; stroke: var(--page); stroke-width: 4px; }
.grid { stroke: var(--rule); }
.axis { stroke: var(--muted); }
.lines polyline { fill: none; stroke: var(--line); stroke-width: 2;
  stroke-linejoin: round; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.lines .faint { stroke-width: 1; opacity: 0.45; }
.dot { fill: var(--line); stroke: var(--page); stroke-width: 1; }
.ring { fill: none; stroke: var(--line); stroke-width: 2; pointer-events: none; }
.mark { stroke: var(--line); stroke-width: 1.5; }
.mark.resumed { stroke-dasharray: 5 4; }
.mark.skipped { stroke-dasharray: 1 3; }
.stop rect { fill: transparent; }
.stop > g { visibility: hidden; pointer-events: none; }
.stop:hover > g { visibility: visible; }
.stop line { stroke: var(--muted); stroke-width: 1; }
.stop text { fill: var(--text); text-anchor: end; }
.first { --line: var(--blue); }
.second { --line: var(--orange); }
.resumed { --line: var(--muted); }
.skipped { --line: var(--red); }
"""
