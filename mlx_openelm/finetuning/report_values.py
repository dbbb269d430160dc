"""Values as text of the report: escaped for HTML, numbers with their units."""

import html
import re

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def escape_text(text: object) -> str:
    """Escape text; characters invalid in HTML or UTF-8 become U+FFFD."""
    return html.escape(_UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(text)))


def show_figure(value: float) -> str:
    """Return a number with five digits."""
    return f"{value:.5g}"


def show_share(value: float) -> str:
    """Return a share in percent."""
    return f"{100 * value:.4g} %"


def show_count(value: float) -> str:
    """Return a count, from 100 on without decimals."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def show_bytes(value: float) -> str:
    """Return a size with its unit."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.0f} B"
