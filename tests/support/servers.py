"""A server in a thread of this process, and a raw HTTP client."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from mlx_openelm.generation.options import Sampling
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.serving.access import Access
from mlx_openelm.text.tokenizer import Tokenizer

GREEDY = Sampling(max_tokens=24)
CONTEXT = 512
USER = {"role": "user", "content": "Hi"}


@contextmanager
def serving(
    model: OpenELM,
    tokenizer: Tokenizer,
    *,
    template: str = "raw",
    adapters: Mapping[str, OpenELM] | None = None,
    given: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    queue: int = 256,
    engine: Mapping[str, Any] | None = None,
    **access,
) -> Iterator:
    """Serve the model "tiny" on a free port; the yielded server has a `url`.

    Args:
        given: options of the command line, by attribute of `Sampling`.
        engine: limits of the engine.
    """
    from mlx_openelm.generation.batching.engine import EngineLimits
    from mlx_openelm.serving.listener import Listener
    from mlx_openelm.serving.served import Served, ServedModel
    from mlx_openelm.serving.server import Server, ServerLimits

    models = {"tiny": ServedModel("tiny", model, template)}
    for name, adapted in (adapters or {}).items():
        models[name] = ServedModel(name, adapted, template, parent="tiny")
    options = {"max_tokens": GREEDY.max_tokens, **(given or {})}
    served = Served(models, tokenizer, {}, options, timeout_s)
    limits = ServerLimits(EngineLimits(**(engine or {})), queue)
    server = Server(Listener(Access(port=0, **access)), served, limits)
    ready, failed = threading.Event(), []

    def run() -> None:
        try:
            server.run(on_ready=lambda url: (setattr(server, "url", url), ready.set()))
        except Exception as error:  # for the test to see
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    server.failed = failed
    ready.wait()
    try:
        yield server
    finally:
        if thread.is_alive():
            server.stop()
        thread.join()


def connect(url: str, timeout: float = 120) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout)


def send(url: str, data: bytes, *, half_close: bool = False) -> tuple[int, dict, bytes]:
    """Send bytes and return status, headers (lower-case names) and body."""
    with connect(url) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return parse(read_all(connection))


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def parse(answer: bytes) -> tuple[int, dict, bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    status = re.fullmatch(r"HTTP/1\.\d (\d{3}) .*", first)
    assert status, answer[:200]
    return (
        int(status[1]),
        {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)},
        body,
    )


def request(
    url: str, path: str, body: object = None, method: str = "POST", **headers: str
) -> bytes:
    """The bytes of a request; the body is a JSON value, or bytes to send unchanged."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    if body is None:
        data = b""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    lines = {"Host": urlsplit(url).netloc, **named}
    if data or method == "POST":
        lines.setdefault("Content-Length", str(len(data)))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data


def post(url: str, body: object, path: str = "/v1/completions", **headers: str):
    """POST; return the status and the JSON response."""
    status, _, answer = send(url, request(url, path, body, **headers))
    return status, json.loads(answer)


def get(url: str, path: str, **headers: str) -> tuple[int, dict, bytes]:
    return send(url, request(url, path, method="GET", **headers))


def healthy(url: str) -> None:
    """Check that the server answers, to the byte."""
    status, _, body = get(url, "/health")
    assert (status, body) == (200, b'{"status": "ok"}')


def measure(url: str) -> dict[str, float]:
    """Return the values at /metrics by name and labels, without our prefix."""
    lines = get(url, "/metrics")[2].decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.removeprefix("mlx_openelm_"): float(value) for name, value in pairs}


def wait_until(condition: Callable[[], bool], *, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def wait_until_idle(url: str) -> None:
    """Wait until no request waits or is decoded."""

    def is_idle() -> bool:
        found = measure(url)
        return found["waiting_requests"] == found["decoding_requests"] == 0

    wait_until(is_idle)


def shrink_buffers(server: Any) -> None:
    """Let connections hold little: a client that does not read then stops the server.

    It applies to the connections that the server accepts from now on.
    """
    server._listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def reset(connection: socket.socket) -> None:
    """Close a connection with a reset, not an end of file."""
    linger = b"\x01\0\0\0\0\0\0\0"
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()


def space_of(tokenizer: Tokenizer) -> int:
    """Return the id of a piece that begins with a space."""
    pieces = map(tokenizer.processor.IdToPiece, range(tokenizer.vocab_size))
    return next(id for id, piece in enumerate(pieces) if piece[:1] == "▁" != piece)


def complete(client: Any, prompt: Any, **options: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, **options)


def client_of(openai: Any, server: Any, key: str = "no key") -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def events(body: bytes) -> list:
    """The JSON documents of an event stream; [DONE] as a string."""
    lines = re.findall(rb"^data: (.*)$", body, re.MULTILINE)
    return [json.loads(data) if data != b"[DONE]" else "[DONE]" for data in lines]
