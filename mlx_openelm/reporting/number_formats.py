"""Numbers as reports show them, with their units."""


def format_number(value: float) -> str:
    """Return a number with five significant digits."""
    return f"{value:.5g}"


def format_share(value: float) -> str:
    """Return a share in percent."""
    return f"{100 * value:.4g} %"


def format_count(value: float) -> str:
    """Return a count, from 100 on without decimals."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_bytes(value: float) -> str:
    """Return a size with its unit."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.0f} B"
