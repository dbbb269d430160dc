"""Access to the server: its address, its API key, and the origins that it trusts."""

import hmac
from dataclasses import dataclass
from urllib.parse import urlsplit

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
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()

    def trusts_host(self, host: str) -> bool:
        """Whether a Host header names this server, not a foreign name for it."""
        known = (self.host, *map(_host_name, self.allowed_origins))
        trusted = not host or "*" in self.allowed_origins
        return trusted or _host_name(f"//{host}") in (*LOOPBACK, *known)

    def allows_origin(self, origin: str, host: str | None) -> bool:
        """Whether pages of `origin` may send requests to this server at `host`."""
        own = origin.partition("://")[2] == host
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


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
