"""Our OpenAI-compatible server: startup, connections, shutdown.

The generation thread is mlx-lm's (see `engine`); requests are answered in `handler`.
Importing this module imports mlx-lm, which takes seconds: do it inside a function.
"""

import errno
import ipaddress
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.serving.access import Access
from mlx_openelm.serving.engine import Engine, Load, our_draws
from mlx_openelm.serving.handler import MOST_AT_ONCE, Handler
from mlx_openelm.serving.requests import Served
from mlx_openelm.version import __version__

SHUTDOWN_GRACE_S = 3.0  # for a last error message to the requests in progress

log = logging.getLogger(__name__)


class Server(ThreadingHTTPServer):
    """HTTP server with one thread for each connection.

    Attributes:
        access: where it listens, and which requests it accepts.
        is_loopback: whether only programs of this machine can reach it.
        stopping: whether it is shutting down.
        under_way: number of requests that are being read or answered.
        slots: for completions; an incomplete request takes none.
    """

    served: Served
    engine: Engine
    daemon_threads = True
    block_on_close = False
    allow_reuse_port = False  # newer Pythons would let two servers share a port
    request_queue_size = MOST_AT_ONCE

    def __init__(self, access: Access) -> None:
        """Bind the port; requests are not answered yet.

        Raises:
            OpenELMError: the port is in use, the host does not exist, or other machines
                could reach it without a key.
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
                "another with `host`."
            ) from error
        address: Any
        self.address_family, _, _, _, address = found[0]
        self.is_loopback = ipaddress.ip_address(str(address[0])).is_loopback
        if not self.is_loopback and not access.api_key:
            raise OpenELMError(
                f"Other machines would reach {access.host}, and anybody could ask; set "
                "a key with `api_key`, or listen at 127.0.0.1."
            )
        self.access, self.stopping = access, False
        self.started = int(time.time())
        self.under_way, self._ended = 0, threading.Condition()
        self.slots = threading.Semaphore(MOST_AT_ONCE)
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

        Requests in progress then receive an error.

        Args:
            on_ready: called with the URL, once requests are answered.

        Raises:
            OpenELMError: the port is in use, or the generation thread has ended.
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
                    self._ended.wait_for(lambda: not self.under_way, SHUTDOWN_GRACE_S)

    @contextmanager
    def track_request(self) -> Iterator[None]:
        """Count a request as under way inside the context."""
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
                "a smaller `decode_concurrency` if memory ran out."
            )

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's looks up the full name of the host
        self.server_name, self.server_port = self.access.host, self.server_address[1]

    def finish_request(self, request: Any, client_address: Any) -> None:
        fingerprint = f"mlx-openelm-{__version__}"  # mlx-lm's identifies the machine
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
                    "`port`."
                ) from error
            raise OpenELMError(
                f"Cannot listen at {where} ({error.strerror}); choose another with "
                "`port` or `host`."
            ) from error
