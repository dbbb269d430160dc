"""The server: its socket, its start and its end.

Importing this module imports uvicorn and Starlette, which takes 0.4 s: do it inside a
function.
"""

import asyncio
import errno
import logging
import math
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import uvicorn

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.batching.engine import Engine, EngineLimits
from mlx_openelm.serving.app import build_app
from mlx_openelm.serving.connections import Connection
from mlx_openelm.serving.engine_thread import EngineState, EngineThread
from mlx_openelm.serving.listener import Listener
from mlx_openelm.serving.metrics import Metrics
from mlx_openelm.serving.served import Served
from mlx_openelm.version import __version__

SHUTDOWN_GRACE_S = 5.0  # for the requests in progress
_OPEN_FILES = 8192  # one each connection
_NO_MORE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_REPORT_INTERVAL_S = 60.0  # of connections that cannot be accepted
_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """How much the server does at a time.

    Attributes:
        engine: limits of the engine.
        queue: requests that wait for a row of the engine; more are refused.
    """

    engine: EngineLimits = field(default_factory=EngineLimits)
    queue: int = 256


class Server:
    """Serves models until a signal, or `stop`, ends it."""

    def __init__(
        self, listener: Listener, served: Served, limits: ServerLimits
    ) -> None:
        self._listener, self._served, self._limits = listener, served, limits
        self._loop: asyncio.AbstractEventLoop | None = None
        self._uvicorn: _Uvicorn | None = None
        self._signal: int | None = None

    def run(self, *, on_ready: Callable[[str], None]) -> None:
        """Answer requests.

        Args:
            on_ready: called with the URL, once requests are answered.

        Raises:
            OpenELMError: the engine has failed.
            SystemExit: a signal has ended the server, with 128 and its number.
        """
        # Arrays that are not computed yet belong to the thread that made them.
        mx.eval([model.model.parameters() for model in self._served.models.values()])
        failure = asyncio.run(self._serve(on_ready))
        if failure is not None:
            raise OpenELMError(
                f"The engine has failed ({failure}); start the server again, with a "
                "smaller `decode_concurrency` if memory ran out."
            ) from failure
        if self._signal is not None:
            raise SystemExit(_EXIT_CODES[signal.Signals(self._signal)])

    def stop(self) -> None:
        """End the server, from another thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin_shutdown)

    async def _serve(self, on_ready: Callable[[str], None]) -> BaseException | None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_make_error_handler())
        _allow_open_files()
        models = {name: m.model for name, m in self._served.models.items()}
        engine_limits = self._limits.engine
        engine = EngineThread(
            lambda: Engine(models, self._served.tokenizer, engine_limits),
            most_requests=engine_limits.answers + self._limits.queue,
            on_failure=self._begin_shutdown,
        )
        self._engine = engine

        def read_state() -> EngineState:
            return engine.state

        app = build_app(
            self._served,
            engine,
            Metrics(read_state),
            self._listener.access,
            is_loopback=self._listener.is_loopback,
        )
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            headers=[("Server", f"mlx-openelm/{__version__}")],
            proxy_headers=False,
            backlog=1024,
            timeout_graceful_shutdown=int(SHUTDOWN_GRACE_S) + 3,
        )
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._uvicorn = _Uvicorn(config, lambda: on_ready(self._listener.url))
        with self._signals():
            try:
                await self._uvicorn.serve(sockets=[self._listener.socket])
            finally:  # a second signal must be handled while a step ends
                await asyncio.to_thread(engine.close)
        return engine.failure

    def _begin_shutdown(self) -> None:
        """Accept no more; let the requests in progress end within the grace period."""
        if self._uvicorn is None or self._uvicorn.should_exit:
            return
        assert self._loop is not None
        self._uvicorn.should_exit = True
        self._engine.refuse_new()
        error = OpenELMError("The server is shutting down.")
        self._loop.call_later(SHUTDOWN_GRACE_S, self._engine.fail_all, error)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Handle signals: the first starts a graceful shutdown, the second exits."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def handle(number: int) -> None:
            if self._signal is not None:
                os._exit(_EXIT_CODES[signal.Signals(number)])
            self._signal = number
            self._begin_shutdown()

        for number in _EXIT_CODES:
            loop.add_signal_handler(number, handle, number)
        try:
            yield
        finally:
            for number in _EXIT_CODES:
                loop.remove_signal_handler(number)


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, with our signal handlers, that reports when it is ready."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _allow_open_files() -> None:
    """Raise the limit of open files to what the server needs, where that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _make_error_handler() -> Callable[
    [asyncio.AbstractEventLoop, dict[str, Any]], None
]:
    """Return the event loop's handler of errors: asyncio's, with one limit.

    At the limit of open files asyncio reports each connection that it cannot accept, a
    thousand times a second; that is logged once a minute.
    """
    next_time = -math.inf

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal next_time
        error = context.get("exception")
        is_limit = isinstance(error, OSError) and error.errno in _NO_MORE_FILES
        if is_limit and "socket" in context:
            if loop.time() < next_time:
                return
            next_time = loop.time() + _REPORT_INTERVAL_S
        loop.default_exception_handler(context)

    return handle
