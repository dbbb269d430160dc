"""The parts of an SVG picture, as text."""

import html
from collections.abc import Iterable

BASE_STYLE = """\
text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "DejaVu Sans", sans-serif; fill: var(--text); font-variant-numeric: tabular-nums; }
.page { fill: var(--page); }
.head { font-size: 18px; font-weight: 600; }
.name { font-weight: 600; font-size: 13px; }
"""


def draw_picture(
    width: int,
    height: int,
    parts: Iterable[str],
    *,
    title: str,
    palette: str,
    style: str,
) -> str:
    """Return a whole SVG document.

    Args:
        title: the text alternative.
        palette: CSS that sets the variables --page and --text, and those of `style`.
        style: CSS of the picture's own classes.
    """
    beginning = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-labelledby="title">',
        f'<title id="title">{escape(title)}</title>',
        f"<style>{palette}{BASE_STYLE}{style}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
    )
    return "\n".join([*beginning, *parts, "</svg>", ""])


def write_text(x: float, y: float, text: str, style: str) -> str:
    """Return a text whose class says its style; (x, y) is where its line begins."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def draw_line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """Return a line whose class says its style."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{style}" {ends}/>'


def shorten(text: str, most: int) -> str:
    """Return at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def escape(text: str) -> str:
    """Escape; what XML cannot hold becomes the replacement character."""
    kept = (c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return html.escape("".join(kept))
