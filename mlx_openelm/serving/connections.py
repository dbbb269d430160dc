"""HTTP connections: uvicorn's, with time limits and for clients of many kinds.

Importing this module imports uvicorn: do it inside a function.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_openelm.serving.errors import RequestError

HEADER_TIMEOUT_S = 20.0  # for the headers of a request


class Connection(H11Protocol):
    """One connection.

    In addition to uvicorn's it closes the connection of a client that does not complete
    its headers; answers a client that has closed its sending side, in HTTP/1.0, as such
    clients expect; and describes malformed requests in JSON.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(_Transport(transport))  # type: ignore[arg-type]
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering() or self.transport.is_closing():
            self._stop_expecting()
        elif self._deadline is None:
            self._expect_headers()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether to keep the connection for an answer."""
        if not self._is_answering() or self.cycle.more_body:
            return False
        assert isinstance(self.transport, _Transport)
        self.transport.is_half_closed = True
        self.scope["half_closed"] = True  # type: ignore[typeddict-unknown-key]
        self.conn.their_http_version = b"1.0"  # h11 then ends the body by closing
        self.cycle.keep_alive = False
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        error = RequestError("The request is not valid HTTP/1.1.", code="bad_http")
        body = json.dumps(error.as_json()).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_headers(self) -> None:
        self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.close)

    def _stop_expecting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Transport:
    """A transport that can write HTTP/1.0 status lines.

    Attributes:
        is_half_closed: whether the client has closed its sending side.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.is_half_closed = False

    def write(self, data: bytes) -> None:
        if self.is_half_closed and data.startswith(b"HTTP/1.1 "):
            data = b"HTTP/1.0 " + data.removeprefix(b"HTTP/1.1 ")
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
