"""Access to the server: its address, its API key, and the origins that it trusts."""

import hmac
import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from mlx_openelm.errors import OpenELMError
from mlx_openelm.serving.errors import RequestError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Access:
    """Where the server listens, and which requests it accepts.

    Attributes:
        port: 0 is any free port.
        api_key: required of every request; None: no key is required.
        allowed_origins: other sites whose pages may send requests; "*" is all of them.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = field(default=None, repr=False)
    allowed_origins: tuple[str, ...] = ()

    def trusts_host(self, host: str) -> bool:
        """Whether a Host header names this server, not a foreign name for it.

        The names are those of the loopback interface, the address of the server, and
        the hosts of allowed origins; a missing header, "", is accepted.
        """
        if not host or "*" in self.allowed_origins:
            return True
        name = _host_name(f"//{host}")
        names = (*LOOPBACK, self.host, *map(_host_name, self.allowed_origins))
        return name is not None and name in names

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether pages of `origin` may send requests to this server at `host`.

        These are the server's own pages, those of allowed origins, and all with "*".
        """
        own = host != "" and origin.partition("://")[2] == host
        return own or origin in self.allowed_origins or "*" in self.allowed_origins

    def check_key(self, authorization: str) -> None:
        """Check an Authorization header.

        Raises:
            RequestError: it does not have the API key.
        """
        if self.api_key is None:
            return
        kind, _, key = authorization.partition(" ")
        given, wanted = key.strip().encode("latin-1"), self.api_key.encode()
        same = hmac.compare_digest(given, wanted)
        if kind.lower() != "bearer" or not same:
            raise RequestError(
                "This server needs its API key: Authorization: Bearer KEY.",
                status=401,
                code="invalid_api_key",
            )


def read_origins(text: str) -> tuple[str, ...]:
    """Return the origins in a list with commas, as browsers write them.

    Raises:
        OpenELMError: one is not "*" or SCHEME://HOST[:PORT].
    """
    parts = (part.strip().rstrip("/").lower() for part in text.split(","))
    origins = tuple(part for part in parts if part)
    wrong = [origin for origin in origins if origin != "*" and not _is_origin(origin)]
    if wrong:
        raise OpenELMError(
            f"`allowed_origins` has {', '.join(map(repr, wrong))}; an origin is "
            "SCHEME://HOST or SCHEME://HOST:PORT, such as https://a.example; * is all."
        )
    return origins


def _is_origin(text: str) -> bool:
    has_form = re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", text)
    return has_form is not None and _host_name(text) is not None


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
