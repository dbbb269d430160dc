"""The page at `/`: one HTML file that loads nothing and asks this server alone."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files


@cache
def read_page() -> bytes:
    """Return the HTML."""
    return files("mlx_openelm.serving").joinpath("page.html").read_bytes()


def _policy() -> str:
    """Return what a browser may do for the page: run its one script, and ask us."""
    (script,) = re.findall(rb"<script>(.*?)</script>", read_page(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    allowed = {
        "default-src": "'none'",
        "script-src": f"'sha256-{digest}'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{kind} {source}" for kind, source in allowed.items())


@cache
def page_headers() -> dict[str, str]:
    """Return the headers that go with it."""
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _policy(),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
