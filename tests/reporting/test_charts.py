"""Line charts: which points are kept, which range the axes have, what is written."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_openelm.reporting.charts import (
    BOTTOM,
    LARGE,
    LEFT,
    RIGHT,
    SMALL,
    TOP,
    Chart,
    Line,
    Mark,
    draw_chart,
    running_mean,
    thin_out,
)
from mlx_openelm.reporting.number_formats import format_number

NUMBERS = st.floats(
    allow_nan=False, allow_infinity=False, min_value=-1e9, max_value=1e9
)
CHART = Chart(
    name="loss",
    title="Loss",
    lines=[
        Line("training", [(n, 3 / n) for n in range(1, 100)], "blue", trend=True),
        Line("validation", [(50, 0.1), (99, 0.2)], "orange", dotted=True, best=50),
    ],
    last_step=99,
    format=format_number,
    marks=[Mark("resumed", [20], "muted", "dashed"), Mark("none", [], "red", "dotted")],
)


@given(st.lists(st.none() | NUMBERS, min_size=60, max_size=99), st.integers(10, 50))
def test_thinning_out_keeps_the_ends_and_the_peaks(values, most):
    points = list(enumerate(values))
    kept = thin_out(points, most)
    assert sum(value is not None for _, value in kept) <= most
    assert set(kept) <= set(points)
    assert [n for n, _ in kept] == sorted({n for n, _ in kept})
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    finite = [value for value in values if value is not None]
    for extreme in (min, max) if finite else ():
        assert extreme(v for _, v in kept if v is not None) == extreme(finite)
    assert (None in values) == any(value is None for _, value in kept)


@settings(max_examples=25, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=9), st.booleans())
def test_every_value_is_inside_the_plotting_area(values, from_zero):
    line = Line("x", list(enumerate(values, start=1)), "blue")
    chart = Chart("x", "X", [line], len(values), format_number, from_zero=from_zero)
    [view] = draw_chart(chart).views
    dots = [dot for band in view.bands for dot in band.dots]
    assert len(dots) == len(values)
    assert all(TOP <= y <= view.height - BOTTOM for _, y, _ in dots)
    assert all(LEFT < x <= view.width - RIGHT + 1e-6 for x, _, _ in dots)
    assert len(re.findall("<text ", view.markup)) >= 4  # ticks and "step"


def test_the_running_mean_leaves_gaps_and_does_not_count_them():
    points = [(1, 1.0), (2, None), (3, 3.0), (4, 5.0)]
    assert running_mean(points, 3) == [(1, 1.0), (2, None), (3, 4.0), (4, 4.0)]


def test_a_chart_is_drawn_at_each_size_and_the_same_again():
    drawn = draw_chart(CHART, (LARGE, SMALL))
    assert [(view.width, view.height) for view in drawn.views] == [LARGE, SMALL]
    assert drawn == draw_chart(CHART, (LARGE, SMALL))
    assert not set(re.findall(' id="(.*?)"', drawn.views[0].markup)) & set(
        re.findall(' id="(.*?)"', drawn.views[1].markup)
    )


def test_colours_are_variables_and_text_is_text():
    markup = draw_chart(CHART).views[0].markup
    assert not re.search("#[0-9a-f]{6}", re.sub('"#[^"]*"', "", markup))
    assert {"var(--blue)", "var(--orange)", "var(--muted)"} <= set(
        re.findall(r"var\(--\w+\)", markup)
    )
    assert ">best: 0.1 at step 50</text>" in markup
    assert "metadata" not in markup  # nor the date


def test_the_legend_names_lines_and_the_marks_that_are_there():
    drawn = draw_chart(CHART)
    assert drawn.legend == [
        ("training", "blue", "faint"),
        ("mean of 5 reports", "blue", ""),
        ("validation", "orange", ""),
        ("resumed", "muted", "dashed"),
    ]
    one = dataclasses.replace(CHART, lines=CHART.lines[1:], marks=())
    assert draw_chart(one).legend == []  # the title names it


def test_the_description_has_first_last_least_and_largest():
    assert draw_chart(CHART).description.startswith(
        "training: 3 at step 1, 0.030303 at step 99, between 0.030303 and 3. "
    )


@pytest.mark.parametrize("values", [[1e-3, 1e299], [5e-324, 1.0], [-1e300, 1e300]])
def test_extreme_values_are_drawn(values):
    line = Line("x", list(enumerate(values)), "blue")
    for from_zero in (False, True):
        chart = dataclasses.replace(CHART, lines=[line], from_zero=from_zero)
        assert "NaN" not in draw_chart(chart).views[0].markup
