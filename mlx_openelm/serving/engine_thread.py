"""The thread in which the engine runs, and its exchange with the event loop."""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.batching.engine import Engine
from mlx_openelm.generation.batching.sequences import BatchRequest, Output

log = logging.getLogger(__name__)


class TooManyRequestsError(Exception):
    """The queue is full."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """Numbers for /metrics.

    Attributes:
        kept_bytes: size of the kept prompts.
    """

    waiting: int = 0
    decoding: int = 0
    kept_bytes: int = 0


class EngineThread:
    """Runs an engine in a thread of its own; its methods belong to the event loop.

    Attributes:
        most_requests: accepted at the same time; more are refused.
        state: of the engine after its last step.
        failure: the error that has ended the thread.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        *,
        most_requests: int,
        on_failure: Callable[[], None],
    ) -> None:
        """Start the thread.

        Args:
            make_engine: called in the thread, as MLX's streams belong to threads.
            most_requests: see the attribute.
            on_failure: called in the event loop if the thread ends with an error.
        """
        self._make_engine, self._on_failure = make_engine, on_failure
        self.most_requests = most_requests
        self._reserved = 0
        self._loop = asyncio.get_running_loop()
        self._listeners: dict[int, tuple[BatchRequest, asyncio.Queue[Output]]] = {}
        self._changed = threading.Condition()
        self._added: list[BatchRequest] = []
        self._cancelled: list[BatchRequest] = []
        self._is_closing = self._refuses = False
        self.state = EngineState()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        return self.failure is None and not self._refuses

    def reserve(self, count: int) -> None:
        """Occupy slots for so many requests, until `release`.

        Raises:
            TooManyRequestsError: they are too many.
        """
        if self._reserved + count > self.most_requests:
            raise TooManyRequestsError
        self._reserved += count

    def release(self, count: int) -> None:
        self._reserved -= count

    async def answer(self, request: BatchRequest) -> AsyncGenerator[Output, None]:
        """Yield what is added to a request's answer; leaving cancels it."""
        outputs: asyncio.Queue[Output] = asyncio.Queue()
        self._listeners[id(request)] = request, outputs
        self._send(request)
        ended = False
        try:
            while not ended:
                output = await outputs.get()
                ended = bool(output.finish_reason or output.error)
                yield output
        finally:
            self._listeners.pop(id(request), None)
            if not ended:
                self._send(request, cancels=True)

    def refuse_new(self) -> None:
        """Accept no more requests; those in progress continue."""
        self._refuses = True

    def fail_all(self, error: OpenELMError) -> None:
        """End all requests with an error."""
        for request, outputs in self._listeners.values():
            outputs.put_nowait(Output(request, error=error))

    def close(self) -> None:
        """End the thread and wait for it."""
        self._refuses = self._is_closing = True
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _send(self, request: BatchRequest, *, cancels: bool = False) -> None:
        with self._changed:
            (self._cancelled if cancels else self._added).append(request)
            self._changed.notify()

    # In the thread ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            engine = self._make_engine()
            while not self._is_closing:
                outputs = self._take_requests(engine)
                if not engine.is_idle:
                    outputs += engine.step()
                state = EngineState(engine.waiting, engine.decoding, engine.kept_bytes)
                self._call(self._deliver, outputs, state)
        except BaseException as error:  # a panic of an extension is no Exception
            log.exception("The engine has failed.")
            self._call(self._fail, error)
        finally:
            # Otherwise MLX destroys the thread's streams after it was joined, and a
            # process that ends meanwhile aborts (seen with mlx 0.32.4 on Linux).
            mx.clear_streams()

    def _take_requests(self, engine: Engine) -> list[Output]:
        """Wait while there is nothing to do; apply what the event loop has sent."""
        with self._changed:
            while engine.is_idle and not (
                self._added or self._cancelled or self._is_closing
            ):
                self._changed.wait()
            added, cancelled = self._added, self._cancelled
            self._added, self._cancelled = [], []
        failed = []
        for request in added:
            try:
                engine.add(request)
            except OpenELMError as error:
                failed.append(Output(request, error=error))
        if cancelled:
            engine.cancel(cancelled)
        return failed

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop was closed
            self._is_closing = True

    # In the event loop -----------------------------------------------------------

    def _deliver(self, outputs: list[Output], state: EngineState) -> None:
        self.state = state
        for output in outputs:
            listener = self._listeners.get(id(output.request))
            if listener is not None:
                listener[1].put_nowait(output)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.fail_all(OpenELMError("The engine has failed."))
        self._on_failure()
