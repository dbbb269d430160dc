"""ASGI middleware: who may send requests, how large and how slow they may be."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_openelm.serving.access import Access
from mlx_openelm.serving.api import MOST_BYTES, MOST_BYTES_TOGETHER
from mlx_openelm.serving.errors import RequestError
from mlx_openelm.serving.metrics import Metrics

CLIENT_TIMEOUT_S = 60.0  # for a client to send its body, or to read a part of an answer
_DISCARD_S = 3.0  # for the rest of a refused body
_OPEN_PATHS = ("/", "/health")  # without an API key
CLIENT_CLOSED = 499  # nginx's status for a client that has closed the connection

log = logging.getLogger("mlx_openelm.serving")


class ClientGoneError(Exception):
    """The client has closed the connection."""


class BodyReader:
    """Reads the bodies of requests, within limits for each and for all together."""

    def __init__(self) -> None:
        self._reading = 0  # bytes

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read a request's body, which counts until the block ends.

        Raises:
            RequestError: it is too large or incomplete, or comes too slowly.
            ClientGoneError: the connection was closed.
        """
        length = request.headers.get("content-length", "0")
        declared = int(length) if length.isdecimal() and len(length) < 16 else 0
        if declared > MOST_BYTES:
            raise _too_large(declared)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(CLIENT_TIMEOUT_S):
                while True:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    part = message.get("body", b"")
                    size += len(part)
                    self._reading += len(part)
                    parts.append(part)
                    if size > MOST_BYTES:
                        raise _too_large(size)
                    if self._reading > MOST_BYTES_TOGETHER:
                        raise RequestError(
                            "Too many large requests at once; try again later.",
                            status=503,
                            code="overloaded",
                        )
                    if not message.get("more_body"):
                        break
            if request.scope.get("is_truncated"):
                raise RequestError("The connection ended within the body.")
            yield b"".join(parts)
        except TimeoutError:
            raise RequestError(
                f"The body was not complete after {CLIENT_TIMEOUT_S:.0f} s.", status=408
            ) from None
        finally:
            self._reading -= size


def _too_large(size: int) -> RequestError:
    return RequestError(
        f"The body has {size} bytes or more; at most {MOST_BYTES} are accepted.",
        status=413,
        code="too_large",
    )


class Guard:
    """Middleware around the whole application.

    It refuses pages of other origins, foreign names of this server (DNS rebinding), and
    missing keys; adds the CORS headers; writes errors as JSON; counts and logs.
    """

    def __init__(
        self, app: ASGIApp, *, access: Access, is_loopback: bool, metrics: Metrics
    ) -> None:
        self._app, self._access, self._metrics = app, access, metrics
        self._is_loopback = is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["path"] = _normalize(scope["path"])
        status, may_have_more = CLIENT_CLOSED, True

        async def receive_counted() -> Message:
            nonlocal may_have_more
            message = await receive()
            may_have_more = message.get("more_body", False)
            return message

        request = Request(scope, receive_counted)

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(request, message)
                if may_have_more and "expect" not in request.headers:
                    await _discard(receive_counted)
            try:
                async with asyncio.timeout(CLIENT_TIMEOUT_S):
                    await send(message)
            except TimeoutError:
                raise ClientGoneError from None

        try:
            await self._respond(request, receive_counted, send_guarded)
        except ClientGoneError:
            status = CLIENT_CLOSED
        except Exception:  # one request must not end without a response
            log.exception("A request has failed.")
            if status == CLIENT_CLOSED:
                failed = RequestError(
                    "The server failed at this request.", status=500, code="failed"
                )
                await error_response(failed)(scope, receive_counted, send_guarded)
        finally:
            self._metrics.requests.labels(_label(scope), str(status)).inc()
            line = _printable(f"{request.method} {scope['path']}")
            log.info("%s %d", line, status)

    async def _respond(self, request: Request, receive: Receive, send: Send) -> None:
        response: Response
        try:
            self._check(request)
            if request.method == "OPTIONS":
                response = Response(status_code=204)
            else:
                await self._app(request.scope, receive, send)
                return
        except RequestError as error:
            response = error_response(error)
        await response(request.scope, receive, send)

    def _check(self, request: Request) -> None:
        version = request.scope["http_version"]
        if version not in ("1.0", "1.1"):
            raise RequestError(f"HTTP {version} is not supported; use 1.1.", status=505)
        host = _host(request)
        if self._is_loopback and not self._access.trusts_host(host):
            raise RequestError(
                f"This server is not {host[:100]!r}; use the address that it printed.",
                status=403,
                code="wrong_host",
            )
        origin = request.headers.get("origin")
        if origin is not None and not self._access.allows_origin(origin, host):
            raise RequestError(
                f"Pages of {origin[:100]!r} may not use this server; start it with "
                "--allowed-origins to allow them.",
                status=403,
                code="wrong_origin",
            )
        if request.method != "OPTIONS" and request.scope["path"] not in _OPEN_PATHS:
            self._access.check_key(request.headers.get("authorization", ""))

    def _add_headers(self, request: Request, message: MutableMapping[str, Any]) -> None:
        origin = request.headers.get("origin")
        # One request per connection: simple clients read until it is closed.
        headers = [(b"connection", b"close"), (b"vary", b"Origin")]
        if origin is not None and self._access.allows_origin(origin, _host(request)):
            wanted = request.headers.get("access-control-request-headers")
            named = wanted or "Authorization, Content-Type"
            headers += [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"access-control-allow-methods", b"GET, POST"),
                (b"access-control-allow-headers", named.encode("latin-1")),
            ]
        message["headers"] = [*message.get("headers", ()), *headers]


def _host(request: Request) -> str:
    return request.headers.get("host", "")  # HTTP/1.0 does not require it


async def _discard(receive: Receive) -> None:
    """Read the rest of a body: closing on unread bytes would lose the response."""
    try:
        async with asyncio.timeout(_DISCARD_S):
            while (await receive()).get("more_body"):
                pass
    except TimeoutError:
        pass


def _normalize(path: str) -> str:
    """Return a path without slashes at its end; of a URL, its path."""
    if path.startswith(("http://", "https://")):  # as clients of a proxy send it
        path = "/" + path.partition("://")[2].partition("/")[2]
    return path.rstrip("/") or "/"


def _label(scope: Scope) -> str:
    """Return the path of a request for /metrics; there are only a few."""
    if scope.get("endpoint") is None:
        return "other"
    path: str = scope["path"]
    for name, value in scope["path_params"].items():
        path = path.removesuffix(value) + f"{{{name}}}"
    return path


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a JSON document as a response."""
    return Response(json.dumps(value), status, headers, "application/json")


def error_response(error: RequestError) -> Response:
    """Return an error as a response."""
    return json_response(error.as_json(), error.status, error.headers)


def _printable(text: str) -> str:
    """Return a client's text with control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)[:500]
