"""matplotlib figures as SVG markup.

The same figure gives the same bytes. Colours become the CSS variables of
`rendering.COLORS`, so that one picture serves light and dark; text stays text.
Lengths and positions are in CSS pixels, from the top left.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from mlx_openelm.reporting.rendering import COLORS, printable

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOR = {name: light for name, (light, _) in COLORS.items()}
_CLASS = "class:"  # beginning of a gid that becomes a CSS class
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mlx-openelm",
    "text.parse_math": False,
    "text.color": COLOR["text"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "figure.facecolor": "none",
    "figure.dpi": 72,  # one unit of the SVG is one pixel
    "axes.facecolor": "none",
    "axes.edgecolor": COLOR["muted"],
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "grid.color": COLOR["rule"],
    "grid.linewidth": 1,
    "xtick.color": COLOR["muted"],
    "ytick.color": COLOR["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 7,
    "ytick.major.pad": 7,
}


@contextlib.contextmanager
def new_figure(width: float, height: float) -> Iterator["Figure"]:
    """Provide an empty figure; it is drawn and turned into markup inside the block."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)  # no notes about its font cache
    try:
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(), warnings.catch_warnings():
            # Widths are measured in DejaVu Sans; a browser has fonts for other scripts.
            warnings.filterwarnings("ignore", message="Glyph")
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            yield Figure(figsize=(width / 72, height / 72))
    finally:
        log.setLevel(level)


def add_axes(
    figure: "Figure", left: float, top: float, width: float, height: float
) -> "Axes":
    """Add a plotting area at a place of the figure."""
    across, down = figure.get_size_inches() * 72
    return figure.add_axes(
        (left / across, 1 - (top + height) / down, width / across, height / down)
    )


def write_text(figure: "Figure", x: float, y: float, text: str, **style: Any) -> None:
    """Write a line of text; (x, y) is where its baseline begins."""
    across, down = figure.get_size_inches() * 72
    figure.text(x / across, 1 - y / down, printable(text), **style)


def css_class(names: str) -> str:
    """Return the gid of an artist whose SVG group has these CSS classes."""
    return _CLASS + names


def to_markup(figure: "Figure", name: str) -> "Markup":
    """Return the content of the figure's <svg> element; ids begin with `name`."""
    from markupsafe import Markup

    written = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(written, format="svg", metadata=nothing)
    root = ElementTree.fromstring(written.getvalue())
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): value for key, value in element.items()}
    for element in root.iter():
        for child in list(element):
            if child.tag in ("style", "clipPath"):  # all data lies inside the axes
                element.remove(child)
    referenced = {e.get("href", "").removeprefix("#") for e in root.iter("use")}
    for element in root.iter():
        _clean(element, name, referenced)
    drawn = "".join(ElementTree.tostring(child, "unicode") for child in root)
    return Markup(drawn)  # ElementTree has escaped it


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _clean(element: ElementTree.Element, name: str, referenced: set[str]) -> None:
    """Give an element of matplotlib's SVG our ids, classes, colours and precision."""
    id_ = element.attrib.pop("id", "")
    if id_.startswith(_CLASS):
        element.set("class", id_.removeprefix(_CLASS))
    elif id_ in referenced:
        element.set("id", f"{name}-{id_}")
    element.attrib.pop("clip-path", None)
    if "href" in element.attrib:
        element.set("href", f"#{name}-{element.get('href', '')[1:]}")
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    for key in ("d", "x", "y", "transform"):
        if key in element.attrib:
            element.set(key, _shorten_numbers(element.get(key, "")))
    if "style" in element.attrib:
        style = re.sub(r"font-family: [^;]*;? ?", "", element.get("style", ""))
        element.set("style", re.sub("#[0-9a-f]{6}", _as_variable, style))
    if element.tag != "text":
        element.text = None
    element.tail = None


def _shorten_numbers(text: str) -> str:
    rounded = re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", text)
    return " ".join(rounded.split())


_VARIABLES = {light: f"var(--{name})" for name, light in COLOR.items()}


def _as_variable(match: re.Match[str]) -> str:
    return _VARIABLES.get(match[0], match[0])
