"""The page at `/`: one HTML file whose only requests are to this server's API."""

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
    """Return the Content-Security-Policy.

    It allows the page's one script, its one style sheet and requests to this server.
    No text can become HTML or script: "trusted-types" forbids innerHTML and its like.
    """
    allowed = {
        "default-src": "'none'",
        "script-src": _hash_of(b"script"),
        "style-src": _hash_of(b"style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{kind} {source}" for kind, source in allowed.items())


def _hash_of(tag: bytes) -> str:
    """Return the hash of the page's only element of this kind, as a source."""
    (text,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), read_page(), re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"


@cache
def page_headers() -> dict[str, str]:
    """Return the headers of the response that holds the page."""
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _policy(),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
