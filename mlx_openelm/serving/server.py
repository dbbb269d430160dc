"""mlx-lm's OpenAI-compatible server, behind our checks and with our text.

mlx-lm's are the generation thread (see serving_engine), and the shape of the answers.
Ours is what stands before it (who may ask, and what) and behind it (tokens become text
as everywhere here).

Importing this room imports mlx-lm, which takes seconds: do it inside a function.
"""

import dataclasses
import errno
import hmac
import ipaddress
import json
import logging
import select
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

import mlx_lm.server as theirs

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.stopping import Answer
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.serving.engine import Engine, Load, our_draws
from mlx_openelm.serving.logprobs import (
    Part,
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

MOST_AT_ONCE = 256  # requests under way or waiting; more are told to come again
PATIENCE_S = 60.0  # for a client that sends or reads slowly
FAREWELL_S = 3.0  # for the last words to the requests that are under way
DISCARD_S = 3.0  # for a refused request to end
LOOPBACK = ("localhost", "127.0.0.1", "::1")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Access:
    """Where the server listens, and who may ask.

    Attributes:
        port: 0 is any free one.
        api_key: what every request has to show; None: nothing.
        allowed_origins: other sites whose pages may ask; "*" is all of them.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()


# What a client meets --------------------------------------------------------------


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Handler(theirs.APIHandler):
    """One connection: a request is checked, answered, and the connection closed."""

    server: "Server"
    timeout = PATIENCE_S
    server_version, sys_version = f"mlx-openelm/{__version__}", ""
    begun = False  # whether an answer's headers are out
    unread = False  # whether there is a body that nobody has read

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.unread = True
        self._answer(self._post)

    def do_OPTIONS(self) -> None:
        self._answer(lambda: self._send(204, b"", {}))

    def _answer(self, answer: Callable[[], None]) -> None:
        with self.server.one_more():
            self._answer_or_refuse(answer)

    def _answer_or_refuse(self, answer: Callable[[], None]) -> None:
        try:
            self._check_place()
            answer()
        except RequestError as error:
            self._refuse(error)
        except (ClientGoneError, ConnectionError, TimeoutError):
            log.info("The client has gone.")
        except Exception as error:  # a bug of ours; the server goes on
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
            self._check_key()
            self._send_models(path.removeprefix("/v1/models").removeprefix("/"))
        else:
            raise _no_such(path)

    def _post(self) -> None:
        path = self._asked_path()
        if path not in _COMPLETIONS:
            raise _no_such(path)
        self._check_key()
        body = read_json(self._read_body())
        request = read_completion(body, self.server.served, chat=_COMPLETIONS[path])
        if not self.server.places.acquire(blocking=False):
            raise RequestError(
                f"{MOST_AT_ONCE} answers are under way; try again later.",
                status=503,
                code="overloaded",
            )
        try:
            self._complete(request)
        finally:
            self.server.places.release()

    # Who may ask -----------------------------------------------------------------

    def _check_place(self) -> None:
        """Refuse pages of other origins, and names that a foreign DNS points here."""
        access, host = self.server.access, self.headers.get("Host", "")
        known = (access.host, *map(_host_name, access.allowed_origins))
        trusted = not host or "*" in access.allowed_origins
        trusted = trusted or _host_name(f"//{host}") in (*LOOPBACK, *known)
        if self.server.is_loopback and not trusted:
            raise RequestError(
                f"This server is not {host[:100]!r}; ask it as {self.server.url}.",
                status=403,
                code="wrong_host",
            )
        origin = self.headers.get("Origin")
        if origin is not None and not self._is_allowed(origin):
            raise RequestError(
                f"Pages of {origin[:100]!r} may not ask this server; start it with "
                "--allowed-origins if they are to.",
                status=403,
                code="wrong_origin",
            )

    def _is_allowed(self, origin: str) -> bool:
        allowed = self.server.access.allowed_origins
        own = origin.partition("://")[2] == self.headers.get("Host")
        return own or origin in allowed or "*" in allowed

    def _check_key(self) -> None:
        wanted = self.server.access.api_key
        if wanted is None:
            return
        kind, _, shown = self.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(shown.strip().encode("latin-1"), wanted.encode())
        if kind.lower() != "bearer" or not same:
            raise RequestError(
                "This server wants its API key, as Authorization: Bearer KEY.",
                status=401,
                code="invalid_api_key",
            )

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
    ) -> Iterator[Part]:
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
                yield Part(text, waiting, reason, count)
                waiting = []
            if reason:
                return
        raise RuntimeError("the generation ended before the answer")

    def _stream_pieces(
        self,
        request: Completion,
        context: theirs.GenerationContext,
        pieces: Iterable[Part],
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
        pieces: Sequence[Part],
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
        pieces: Iterable[Part],
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


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


# The server ------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Listens, and runs one thread for every connection.

    Attributes:
        access: where, and for whom.
        is_loopback: whether only programs of this machine reach it.
        stopping: whether it is about to end.
        under_way: the number of requests that are being read or answered.
        places: for completions; a request that is not whole takes none.
    """

    served: Served
    engine: Engine
    daemon_threads = True
    block_on_close = False
    allow_reuse_port = False  # newer Pythons would let two servers share a port
    request_queue_size = MOST_AT_ONCE

    def __init__(self, access: Access) -> None:
        """Take the port; nobody is answered yet.

        Raises:
            OpenELMError: the port is taken, there is no such host, or others could
                reach it without a key.
        """
        try:
            found = socket.getaddrinfo(
                access.host,
                access.port,
                type=socket.SOCK_STREAM,
                flags=socket.AI_PASSIVE,
            )
        except (OSError, UnicodeError) as error:
            raise OpenELMError(
                f"There is no host {access.host!r} to listen at ({error}); choose "
                "another with --host."
            ) from error
        address: Any
        self.address_family, _, _, _, address = found[0]
        self.is_loopback = ipaddress.ip_address(str(address[0])).is_loopback
        if not self.is_loopback and not access.api_key:
            raise OpenELMError(
                f"Other machines would reach {access.host}, and anybody could ask; set "
                "a key with --api-key, or listen at 127.0.0.1."
            )
        self.access, self.stopping = access, False
        self.started = int(time.time())
        self.under_way, self._ended = 0, threading.Condition()
        self.places = threading.Semaphore(MOST_AT_ONCE)
        super().__init__(address, Handler, bind_and_activate=False)
        with self._named_errors():
            self.server_bind()

    @property
    def url(self) -> str:
        host = f"[{self.access.host}]" if ":" in self.access.host else self.access.host
        return f"http://{host}:{self.server_address[1]}"

    def run(
        self,
        served: Served,
        model: OpenELM,
        load: Load,
        *,
        on_ready: Callable[[str], None],
    ) -> None:
        """Answer until an exception (Ctrl-C's, SIGTERM's) or `shutdown` ends it.

        Requests that are under way then get an error as their last word.

        Args:
            on_ready: gets the URL, once a request would be answered.

        Raises:
            OpenELMError: the port is taken, or the model's thread has ended.
        """
        self.served = served
        with self._named_errors():
            self.server_activate()
        with our_draws():
            self.engine = Engine(model, served.tokenizer.eos_id, load)
            try:
                on_ready(self.url)
                self.serve_forever(poll_interval=0.2)
            finally:
                self.stopping = True
                self.server_close()
                self.engine.stop_and_join()
                with self._ended:
                    self._ended.wait_for(lambda: not self.under_way, FAREWELL_S)

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Count a request that is under way."""
        with self._ended:
            self.under_way += 1
        try:
            yield
        finally:
            with self._ended:
                self.under_way -= 1
                self._ended.notify_all()

    def service_actions(self) -> None:
        if not self.engine.generation_available():
            raise OpenELMError(
                "The model's thread has ended, see above; start the server again, with "
                "a smaller --decode-concurrency if memory ran out."
            )

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's would look up the host's full name
        self.server_name, self.server_port = self.access.host, self.server_address[1]

    def finish_request(self, request: Any, client_address: Any) -> None:
        fingerprint = f"mlx-openelm-{__version__}"  # mlx-lm's tells of the machine
        Handler(
            self.engine, request, client_address, self, system_fingerprint=fingerprint
        )

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            log.error("A connection has failed.", exc_info=error)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.server_close()
            where = f"port {self.access.port} of {self.access.host}"
            if error.errno == errno.EADDRINUSE:
                raise OpenELMError(
                    f"Another program listens at {where}; choose another port with "
                    "--port."
                ) from error
            raise OpenELMError(
                f"Cannot listen at {where} ({error.strerror}); choose another with "
                "--port or --host."
            ) from error
