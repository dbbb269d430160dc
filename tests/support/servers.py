"""A server in a thread of this process, and a raw HTTP client."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from mlx_openelm.generation.options import Sampling
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.serving.requests import Served
from mlx_openelm.text.tokenizer import Tokenizer

GREEDY = Sampling(max_tokens=24)


@contextmanager
def serving(
    model: OpenELM,
    tokenizer: Tokenizer,
    *,
    defaults: Sampling = GREEDY,
    template: str = "raw",
    **access,
) -> Iterator:
    """Serve on a free port; the yielded server has a `url`."""
    from mlx_openelm.serving.access import Access
    from mlx_openelm.serving.engine import Load
    from mlx_openelm.serving.server import Server

    config = model.config
    served = Served(
        *("tiny", tokenizer, defaults, template),
        context_length=config.max_context_length,
        rows=config.vocab_size,
    )
    server = Server(Access(port=0, **access))
    ready, failed = threading.Event(), []

    def run() -> None:
        try:
            server.run(served, model, Load(), on_ready=lambda url: ready.set())
        except Exception as error:  # for the test to see
            failed.append(error)
        finally:
            server.server_close()
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    server.failed = failed
    ready.wait()
    try:
        yield server
    finally:
        if thread.is_alive():
            server.shutdown()
        thread.join()


def connect(url: str, timeout: float = 20) -> socket.socket:
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


def events(body: bytes) -> list:
    """The JSON documents of an event stream; [DONE] as a string."""
    lines = re.findall(rb"^data: (.*)$", body, re.MULTILINE)
    return [json.loads(data) if data != b"[DONE]" else "[DONE]" for data in lines]
