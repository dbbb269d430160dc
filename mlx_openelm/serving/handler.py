"""One HTTP request: checked, answered by the engine, and written as JSON or a stream.

mlx-lm builds the JSON of an answer; the checks before it, and the text in it, are ours.
Importing this module imports mlx-lm, which takes seconds: do it inside a function.
"""

import dataclasses
import json
import logging
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol
from urllib.parse import urlsplit

import mlx_lm.server as theirs

from mlx_openelm.generation.stopping import Answer
from mlx_openelm.serving.access import Access
from mlx_openelm.serving.engine import Engine
from mlx_openelm.serving.logprobs import (
    ResponseChunk,
    describe_for_chat,
    describe_for_completions,
)
from mlx_openelm.serving.page import page_headers, read_page
from mlx_openelm.serving.requests import (
    MOST_BYTES,
    Completion,
    RequestError,
    Served,
    read_completion,
    read_json,
)
from mlx_openelm.version import __version__

MOST_AT_ONCE = 256  # requests in progress or queued; more are refused
CLIENT_TIMEOUT_S = 60.0  # of a client that sends or reads slowly
DISCARD_S = 3.0  # for a refused request to end

log = logging.getLogger(__name__)


class RequestServer(Protocol):
    """The attributes of `Server` that a request needs."""

    access: Access
    served: Served
    engine: Engine
    slots: threading.Semaphore
    is_loopback: bool
    stopping: bool
    started: int

    @property
    def url(self) -> str: ...

    def track_request(self) -> AbstractContextManager[None]: ...


class ClientGoneError(Exception):
    """The client has closed the connection."""


class Handler(theirs.APIHandler):
    """One connection: reads, checks and answers one request, then closes."""

    server: RequestServer  # type: ignore[assignment] # narrower than BaseServer
    timeout = CLIENT_TIMEOUT_S
    server_version, sys_version = f"mlx-openelm/{__version__}", ""
    begun = False  # whether the headers of an answer were sent
    unread = False  # whether there is an unread body

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.unread = True
        self._answer(self._post)

    def do_OPTIONS(self) -> None:
        self._answer(lambda: self._send(204, b"", {}))

    def _answer(self, answer: Callable[[], None]) -> None:
        with self.server.track_request():
            self._answer_or_refuse(answer)

    def _answer_or_refuse(self, answer: Callable[[], None]) -> None:
        try:
            self._check_place()
            answer()
        except RequestError as error:
            self._refuse(error)
        except (ClientGoneError, ConnectionError, TimeoutError):
            log.info("The client has gone.")
        except Exception as error:  # a bug of ours; the server continues
            code = "shutting_down" if self.server.stopping else "failed"
            message = "The server is shutting down."
            if not self.server.stopping:
                log.exception("A request has failed.")
                message = f"The server failed at this request: {error}."
            self._refuse(RequestError(message, status=503, code=code))

    def _asked_path(self) -> str:
        try:
            return urlsplit(self.path).path
        except ValueError as error:
            raise RequestError(f"This is no address: {error}.") from error

    def _get(self) -> None:
        path = self._asked_path()
        if path == "/":
            self._send(200, read_page(), page_headers())
        elif path == "/health":
            healthy = self.server.engine.is_healthy
            status, word = (200, "ok") if healthy else (503, "unavailable")
            self._send_json(status, {"status": word})
        elif path == "/v1/models" or path.startswith("/v1/models/"):
            self.server.access.check_key(self.headers.get("Authorization", ""))
            self._send_models(path.removeprefix("/v1/models").removeprefix("/"))
        else:
            raise _no_such(path)

    def _post(self) -> None:
        path = self._asked_path()
        if path not in _COMPLETIONS:
            raise _no_such(path)
        self.server.access.check_key(self.headers.get("Authorization", ""))
        body = read_json(self._read_body())
        request = read_completion(body, self.server.served, chat=_COMPLETIONS[path])
        if not self.server.slots.acquire(blocking=False):
            raise RequestError(
                f"{MOST_AT_ONCE} answers are under way; try again later.",
                status=503,
                code="overloaded",
            )
        try:
            self._complete(request)
        finally:
            self.server.slots.release()

    # Who may ask -----------------------------------------------------------------

    def _check_place(self) -> None:
        """Refuse pages of other origins, and foreign names of this server (DNS)."""
        host = self.headers.get("Host", "")
        if self.server.is_loopback and not self.server.access.trusts_host(host):
            raise RequestError(
                f"This server is not {host[:100]!r}; ask it as {self.server.url}.",
                status=403,
                code="wrong_host",
            )
        origin = self.headers.get("Origin")
        if origin is not None and not self._is_allowed(origin):
            raise RequestError(
                f"Pages of {origin[:100]!r} may not ask this server; start it with "
                "`allowed_origins` if they are to.",
                status=403,
                code="wrong_origin",
            )

    def _is_allowed(self, origin: str) -> bool:
        return self.server.access.allows_origin(origin, self.headers.get("Host"))

    def _set_cors_headers(self) -> None:
        # mlx-lm's "*" for headers leaves Authorization out, by the Fetch standard.
        origin = self.headers.get("Origin") if hasattr(self, "headers") else None
        if origin is not None and self._is_allowed(origin):
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Access-Control-Allow-Methods", "GET, POST")
            allowed = "Authorization, Content-Type"
            asked = self.headers.get("Access-Control-Request-Headers", "")
            self.send_header("Access-Control-Allow-Headers", asked or allowed)
        self.send_header("Vary", "Origin")

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not length:
            raise RequestError("Send a Content-Length, and no chunks.", status=411)
        if not (length.isascii() and length.isdigit()):
            raise RequestError("Content-Length is no number.")
        if len(length) > 15 or int(length) > MOST_BYTES:
            raise RequestError(
                f"The request has {length[:30]} bytes; at most {MOST_BYTES} are read.",
                status=413,
                code="too_large",
            )
        try:
            body: bytes = self.rfile.read(int(length))
        except TimeoutError:
            raise RequestError(
                "The request did not come in time.", status=408
            ) from None
        self.unread = False
        if len(body) < int(length):
            raise ClientGoneError
        return body

    # Completions -----------------------------------------------------------------

    def _complete(self, request: Completion) -> None:
        """Write an answer, as a stream or as a whole."""
        self.stream = request.stream  # this and the next four are mlx-lm's names
        self.requested_model = self.server.served.name
        self.object_type = "text_completion"
        if request.chat:
            self.object_type = "chat.completion" + (".chunk" if self.stream else "")
        self.request_id = f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4()}"
        context, responses = self.server.engine.answer(request, self._keep_alive)
        try:
            pieces = self._pieces(request, responses)
            if self.stream:
                self._stream_pieces(request, context, pieces)
            else:
                self._send_whole(request, context, list(pieces))
        finally:
            context.stop()

    def _pieces(
        self, request: Completion, responses: Iterable[theirs.Response]
    ) -> Iterator[ResponseChunk]:
        """Yield texts with the tokens that they were made of.

        What is held back (half a character, the beginning of a stop text) waits for
        what comes next.
        """
        tokenizer, sampling = self.server.served.tokenizer, request.sampling
        answer = Answer(tokenizer, request.prompt, sampling, sampling.max_tokens)
        drops_space = request.drops_space
        waiting: list[theirs.Response] = []
        for count, response in enumerate(responses, start=1):
            self._check_client()
            text = answer.add(response.token)
            if drops_space and text:
                text, drops_space = text.removeprefix(" "), False
            ended_itself = response.token == tokenizer.eos_id
            if not ended_itself:
                waiting.append(response)
            reason = answer.finish_reason
            if reason or text:
                if reason == "stop" and not ended_itself and not text:
                    waiting = []  # they spelled the stop text
                yield ResponseChunk(text, waiting, reason, count)
                waiting = []
            if reason:
                return
        raise RuntimeError("the generation ended before the answer")

    def _stream_pieces(
        self,
        request: Completion,
        context: theirs.GenerationContext,
        pieces: Iterable[ResponseChunk],
    ) -> None:
        self._set_stream_headers(200)
        self.end_headers()
        self.begun = True
        place = count = 0
        for piece in pieces:
            reason: Any = piece.finish_reason
            chunk = self.generate_response(piece.text, reason)
            if request.tells_logprobs:
                self._add_logprobs(chunk, request, [piece], place)
            self._send_event(json.dumps(chunk))
            place, count = place + len(piece.text), piece.count
        if request.usage_in_stream:
            usage = self.completion_usage_response(
                len(request.prompt), count, context.prompt_cache_count
            )
            self._send_event(json.dumps(usage | {"object": self.object_type}))
        self._send_event("[DONE]")

    def _send_whole(
        self,
        request: Completion,
        context: theirs.GenerationContext,
        pieces: Sequence[ResponseChunk],
    ) -> None:
        reason: Any = pieces[-1].finish_reason
        whole = self.generate_response(
            "".join(piece.text for piece in pieces),
            reason,
            len(request.prompt),
            pieces[-1].count,
            context.prompt_cache_count,
        )
        if request.tells_logprobs:
            self._add_logprobs(whole, request, pieces, 0)
        self._send_json(200, whole)

    def _add_logprobs(
        self,
        response: dict[str, Any],
        request: Completion,
        pieces: Iterable[ResponseChunk],
        place: int,
    ) -> None:
        describe = describe_for_chat if request.chat else describe_for_completions
        told = describe(self.server.served.tokenizer, pieces, place)
        response["choices"][0]["logprobs"] = told

    def _keep_alive(self, done: int, total: int) -> None:
        """Say in a stream, as mlx-lm does, how much of the prompt was read."""
        self._check_client()
        if self.begun:
            self.wfile.write(f": keepalive {done}/{total}\n\n".encode())

    def _check_client(self) -> None:
        """Raise ClientGoneError where the connection was closed at the other end."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ClientGoneError

    # Bytes -----------------------------------------------------------------------

    def _send_models(self, name: str) -> None:
        served = self.server.served
        model = {
            "id": served.name,
            "object": "model",
            "created": self.server.started,
            "owned_by": "mlx-openelm",
            "context_length": served.context_length,
            "template": served.template,
            "defaults": dataclasses.asdict(served.defaults),
        }
        if name not in ("", served.name):
            raise RequestError(
                f"This server has the model {served.name!r} alone.",
                status=404,
                code="model_not_found",
            )
        self._send_json(200, model if name else {"object": "list", "data": [model]})

    def _send_event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())

    def _send_json(
        self, status: int, value: Mapping[str, Any], headers: Mapping[str, str] = {}
    ) -> None:
        kind = {"Content-Type": "application/json"}
        self._send(status, json.dumps(value).encode(), kind | dict(headers))

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self._set_cors_headers()
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Refuse what http.server cannot read as a request, in JSON as everything."""
        self.request_version = self.protocol_version  # or it would leave out the head
        self._refuse(RequestError(f"{message or 'Bad request'}.", status=code))

    def _refuse(self, error: RequestError) -> None:
        """Tell a client what is wrong; in a stream that has begun, at its end."""
        with suppress(OSError):  # there may be nobody to tell
            if self.begun:
                self._send_event(json.dumps(error.as_json()))
                return
            headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}
            self._send_json(
                error.status, error.as_json(), headers.get(error.status, {})
            )
            if self.unread:
                self._discard()

    def _discard(self) -> None:
        """Read on for a while: to close on unread bytes would take our words away."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(DISCARD_S)
        end = time.monotonic() + DISCARD_S
        while time.monotonic() < end and self.rfile.read1(2**16):
            pass

    def log_message(self, format: str, *args: Any) -> None:
        line = format % args  # a client's: it may hold what a terminal obeys
        log.info("%s", "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


_COMPLETIONS = {  # path -> whether it is chat
    "/v1/completions": False,
    "/v1/chat/completions": True,
    "/chat/completions": True,
}


def _no_such(path: str) -> RequestError:
    return RequestError(
        f"There is nothing at {path[:100]!r}; POST to /v1/completions or "
        "/v1/chat/completions, or GET /v1/models, /health or the page at /.",
        status=404,
        code="not_found",
    )
