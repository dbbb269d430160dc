"""Jinja2 templates of pages and pictures: every value is escaped."""

import functools
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

# Colours of pages and pictures: the CSS variable, its value on white and on black.
COLORS = {
    "page": ("#ffffff", "#14171b"),
    "text": ("#1b1f24", "#e4e8ed"),
    "muted": ("#57606a", "#9ba6b2"),
    "rule": ("#d9dde2", "#343b44"),
    "panel": ("#f5f7f9", "#1d2127"),
    "blue": ("#1f66b5", "#6cb0ff"),
    "orange": ("#b8480b", "#ff9a55"),
    "green": ("#1a7f37", "#57c878"),
    "purple": ("#8250df", "#b392f0"),
    "brown": ("#9a6700", "#d9a520"),
    "pink": ("#bf3989", "#f778ba"),
    "red": ("#c4212f", "#ff7d85"),
}

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def printable(text: object) -> str:
    """Return a text; characters invalid in HTML, XML or UTF-8 become U+FFFD."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(text))


def render(template: str, **values: Any) -> str:
    """Return a template of this package, filled with values."""
    return _environment().get_template(template).render(colors=COLORS, **values)


@functools.cache
def _environment() -> "Environment":
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mlx_openelm.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda v: v if isinstance(v, Markup) else printable(v),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["zip"] = zip
    return environment
