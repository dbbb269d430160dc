"""Curves of scores over training iterations, as a self-contained SVG file."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_openelm.reporting.drawing import (
    COLOR,
    add_axes,
    css_class,
    new_figure,
    write_text,
)
from mlx_openelm.reporting.pictures import FOOT_LINE, HEAD, SERIES_COLORS, finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, PANEL, GAP, LEGEND = 760, 260, 74, 20  # pixels; GAP is below a panel
LEFT, RIGHT = 70, 24


@dataclass(frozen=True, slots=True)
class Curve:
    """A score over the iterations: (iteration, value, standard error or None)."""

    name: str
    points: Sequence[tuple[float, float, float | None]]
    in_percent: bool = True


def draw_curves(
    curves: Sequence[Curve], title: str, *, axis: str, notes: Sequence[str]
) -> str:
    """Return one panel for percentages and one for each other score."""
    shares = [curve for curve in curves if curve.in_percent]
    panels = [[curve] for curve in curves if not curve.in_percent]
    panels += [shares] if shares else []
    lines = [line for note in notes for line in textwrap.wrap(note, 105)]
    height = 60.0 + sum(LEGEND * len(panel) + PANEL + GAP for panel in panels)
    with new_figure(WIDTH, height + FOOT_LINE * len(lines)) as figure:
        write_text(figure, 20, 34, title, **HEAD)
        top = 60.0
        for panel in panels:
            top = _draw_panel(figure, panel, top, axis)
        description = "; ".join(_describe(curve) for curve in curves)
        return finish(figure, top, lines, description or "No score was measured")


def _draw_panel(
    figure: "Figure", curves: Sequence[Curve], top: float, axis: str
) -> float:
    """Draw the legend and the curves; return the place below them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for i, curve in enumerate(curves):
        color = _color(i)
        write_text(figure, 20, top, "\N{BLACK CIRCLE}", color=color)
        write_text(figure, 38, top, curve.name + (" (%)" if curve.in_percent else ""))
        top += LEGEND
    axes = add_axes(figure, LEFT, top, WIDTH - LEFT - RIGHT, PANEL)
    for i, curve in enumerate(curves):
        steps, values, errors = zip(*curve.points, strict=True)
        axes.errorbar(
            steps,
            values,
            yerr=None if None in errors else errors,
            fmt="o-",
            color=_color(i),
            markersize=6,
            linewidth=2,
            elinewidth=1.5,
        )
        axes.lines[-1].set_gid(css_class(f"line {SERIES_COLORS[i % 6]}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.set_xlabel(axis, loc="right", fontstyle="italic", color=COLOR["muted"])
    return top + PANEL + GAP


def _color(number: int) -> str:
    return COLOR[SERIES_COLORS[number % len(SERIES_COLORS)]]


def _describe(curve: Curve) -> str:
    values = ", ".join(f"{value:.4g} at {step:,.0f}" for step, value, _ in curve.points)
    return f"{curve.name}: {values}"
