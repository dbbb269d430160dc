"""The report of `bench` as a picture: one self-contained SVG file.

Bars for the speed, and beside them bars for the share of the memory bandwidth.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mlx_openelm.cli.views.bench import describe_bandwidth, describe_cell, show_number
from mlx_openelm.cli.views.svg import draw_line, draw_picture, shorten, write_text

if TYPE_CHECKING:
    from mlx_openelm.bench.report import BenchReport, Cell

WIDTH, TOP, ROW, BAR = 960, 92, 38, 16
LABELS, SPEED, SHARE = 20, (300, 590), (680, 890)  # where they stand


def draw_bench(report: "BenchReport") -> str:
    """Return the picture as an SVG document."""
    cells = report.cells
    speeds = [c.generation_tps.high for c in cells if c.generation_tps is not None]
    speeds += [c.published.generation_tps for c in cells if c.published is not None]
    shares = [c.bandwidth_share.high for c in cells if c.bandwidth_share is not None]
    fastest, largest = max(speeds, default=1.0), max([1.0, *shares])
    bottom = TOP + ROW * len(cells)
    feet = _feet(report)
    height = bottom + 40 + 18 * len(feet)
    machine = f"{report.machine.device}, {report.machine.system}"
    parts = [
        write_text(LABELS, 30, "Speed of OpenELM on this machine", "head"),
        write_text(LABELS, 50, machine, "muted"),
        write_text(SPEED[0], TOP - 14, "new tokens per second", "muted"),
        write_text(SHARE[0], TOP - 14, "share of the memory bandwidth", "muted"),
        *(draw_line(x, TOP - 4, x, bottom, "axis") for x in (SPEED[0], SHARE[0])),
    ]
    full = SHARE[0] + (SHARE[1] - SHARE[0]) / largest
    if shares:
        parts += [
            draw_line(full, TOP - 4, full, bottom, "full"),
            write_text(full, bottom + 14, "100 %", "muted middle"),
        ]
    for i, cell in enumerate(cells):
        y = TOP + ROW * i + ROW / 2
        parts += _draw_row(cell, y, fastest, largest)
    for i, foot in enumerate(feet):
        parts.append(write_text(LABELS, bottom + 38 + 18 * i, foot, "muted"))
    return draw_picture(
        WIDTH, height, parts, title=_tell(cells), palette=_PALETTE, style=_STYLE
    )


def _draw_row(cell: "Cell", y: float, fastest: float, largest: float) -> Iterator[str]:
    yield write_text(LABELS, y - 2, _name(cell), "name")
    yield write_text(LABELS, y + 13, _label(cell), "small")
    if cell.generation_tps is None or cell.bandwidth_share is None:
        yield write_text(SPEED[0] + 8, y + 5, shorten(describe_cell(cell), 95), "small")
        return
    for (left, right), figure, largest_value, shown, style in (
        (SPEED, cell.generation_tps, fastest, cell.generation_tps.median, "speed"),
        (SHARE, cell.bandwidth_share, largest, None, "share"),
    ):
        scale = (right - left) / largest_value
        width = max(1.0, figure.median * scale)
        yield (
            f'<rect class="{style}" x="{left}" y="{y - BAR / 2:.1f}" '
            f'width="{width:.1f}" height="{BAR}"/>'
        )
        ends = left + figure.low * scale, left + figure.high * scale
        if figure.low < figure.high:
            yield draw_line(ends[0], y, ends[1], y, "spread")
        said = f"{100 * figure.median:.0f} %" if shown is None else show_number(shown)
        place = max(left + width, ends[1])
        if style == "speed" and cell.published is not None:
            at = left + cell.published.generation_tps * scale
            yield draw_line(at, y - ROW / 2 + 3, at, y + ROW / 2 - 3, "published")
            if abs(at - place - 20) < 30:  # else the mark would go through the number
                place = max(place, at)
        yield write_text(place + 6, y + 5, said, "value")


def _feet(report: "BenchReport") -> list[str]:
    feet = [
        f"Memory is read at {describe_bandwidth(report.bandwidth)}.",
        "Bars: medians of the rounds; the thin line goes from least to largest.",
    ]
    if any(cell.made for cell in report.cells):
        feet.append("Made weights: speed does not depend on their values.")
    for published in [c.published for c in report.cells if c.published is not None][:1]:
        setting = published.setting
        feet.append(f"Dashed: published by Apple ({setting}), recalled, unverified.")
    return feet


def _name(cell: "Cell") -> str:
    return shorten(cell.model, 32) + (", made weights" if cell.made else "")


def _label(cell: "Cell") -> str:
    parts = [f"{cell.bits} bits in {cell.computed_with.removeprefix('packed, ')}"]
    parts += [f"batch {cell.batch}"] if cell.batch > 1 else []
    parts += [f"{cell.context} tokens"]
    return ", ".join(parts)


def _tell(cells: Sequence["Cell"]) -> str:
    """Return the picture's text alternative."""
    said = [
        f"{cell.model}, {_label(cell)}: {show_number(cell.generation_tps.median)} new "
        f"tokens per second, {100 * cell.bandwidth_share.median:.0f} % of the memory "
        f"bandwidth"
        for cell in cells
        if cell.generation_tps is not None and cell.bandwidth_share is not None
    ]
    return "; ".join(said) or "Nothing was measured"


_PALETTE = """
svg { --page: #ffffff; --text: #1b1f24; --muted: #57606a; --rule: #c9ced4;
  --blue: #1f66b5; --orange: #b8480b; }
@media (prefers-color-scheme: dark) {
  svg { --page: #14171b; --text: #e4e8ed; --muted: #9ba6b2; --rule: #3a414a;
    --blue: #6cb0ff; --orange: #ff9a55; }
}
"""
_STYLE = """\
.small, .muted { fill: var(--muted); font-size: 12px; }
.middle { text-anchor: middle; }
.value { font-weight: 600; }
.axis { stroke: var(--muted); }
.full { stroke: var(--rule); stroke-dasharray: 3 3; }
.speed { fill: var(--blue); }
.share { fill: var(--orange); }
.spread { stroke: var(--text); stroke-width: 1.5; }
.published { stroke: var(--text); stroke-width: 2; stroke-dasharray: 3 3; }
"""
