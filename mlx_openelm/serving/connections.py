"""HTTP connections: uvicorn's, with time limits and for clients of many kinds.

Importing this module imports uvicorn: do it inside a function.
"""

import asyncio
import json
import resource
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_openelm.serving.errors import RequestError

HEADER_TIMEOUT_S = 20.0  # for the headers of a request
CLOSE_TIMEOUT_S = 20.0  # for a client to read the rest of its response
_DISCARD_S = 3.0  # for the rest of a malformed request
_OTHER_FILES = 64  # open files that are no connections
_FEWEST = 16  # connections, however few files may be open


class Connection(H11Protocol):
    """One connection.

    In addition to uvicorn's it closes the connection of a client that does not complete
    its headers, or does not read its response; answers a client that has closed its
    sending side, in HTTP/1.0, as such clients expect; describes malformed requests in
    JSON; and refuses connections when few more files can be opened.
    """

    _deadline: asyncio.TimerHandle | None = None
    _is_refused = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(_Transport(transport, self.loop))  # type: ignore[arg-type]
        if len(self.connections) > _most_connections():
            self._refuse(
                RequestError(
                    "Too many connections; try again later.",
                    status=503,
                    code="overloaded",
                )
            )
        else:
            self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        super().data_received(data)
        if self._is_answering() or self.transport.is_closing():
            self._stop_expecting()
        elif self._deadline is None:
            self._expect_headers()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether to keep the connection for an answer."""
        if self._is_refused or not self._is_answering():
            return False
        assert isinstance(self.transport, _Transport)
        self.transport.is_half_closed = True
        self.scope["half_closed"] = True  # type: ignore[typeddict-unknown-key]
        self.conn.their_http_version = b"1.0"  # h11 then ends the body by closing
        self.cycle.keep_alive = False
        if self.cycle.more_body:
            self.scope["is_truncated"] = True  # type: ignore[typeddict-unknown-key]
            self.cycle.more_body = False
            self.cycle.message_event.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._refuse(
            RequestError("The request is not valid HTTP/1.1.", code="bad_http")
        )

    def _refuse(self, error: RequestError) -> None:
        """Send an error and close the connection.

        What the client still sends is read for a while: closing on unread bytes would
        lose the response.
        """
        self._is_refused = True
        if self.cycle is not None and self.cycle.response_started:
            self.transport.close()
            return
        body = json.dumps(error.as_json()).encode()
        lines = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in error.headers.items()),
            "Connection: close",
        )
        head = "".join(f"{line}\r\n" for line in (*lines, ""))
        self.transport.write(head.encode() + body)
        with suppress(OSError):  # the client has closed the connection
            self.transport.write_eof()
        self._stop_expecting()
        self._deadline = self.loop.call_later(_DISCARD_S, self.transport.close)

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

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._transport, self._loop = transport, loop
        self.is_half_closed = False

    def write(self, data: bytes) -> None:
        if self.is_half_closed and data.startswith(b"HTTP/1.1 "):
            data = b"HTTP/1.0 " + data.removeprefix(b"HTTP/1.1 ")
        self._transport.write(data)

    def close(self) -> None:
        """Close when all is sent; without the rest if the client does not read it."""
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._loop.call_later(CLOSE_TIMEOUT_S, self._transport.abort)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _most_connections() -> int:
    """Return how many connections may be open, by the limit of open files."""
    most_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most_files == resource.RLIM_INFINITY:
        return 2**31
    return max(_FEWEST, most_files - _OTHER_FILES)
