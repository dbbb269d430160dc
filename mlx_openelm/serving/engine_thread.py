"""The thread in which the engine runs, and its exchange with the event loop."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

import mlx.core as mx

from mlx_openelm.device import release_memory
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.batching.engine import Engine
from mlx_openelm.generation.batching.sequences import (
    BatchRequest,
    Output,
    as_request_error,
)

log = logging.getLogger(__name__)

IDLE_S = 0.05  # after this time without requests, unused memory is released


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
        self._loop = asyncio.get_running_loop()
        self._listeners: dict[BatchRequest, Callable[[Output], None]] = {}
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

    def start(
        self, requests: Sequence[BatchRequest], on_output: Callable[[Output], None]
    ) -> "Answers":
        """Send requests to the engine; each occupies a slot until its answer ends.

        Args:
            on_output: called with each output when it comes from the engine.

        Raises:
            TooManyRequestsError: fewer slots are free.
        """
        if len(self._listeners) + len(requests) > self.most_requests:
            raise TooManyRequestsError
        answers = Answers(self, requests)

        def listen(output: Output) -> None:
            on_output(output)
            answers.outputs.put_nowait(output)

        self._listeners |= dict.fromkeys(requests, listen)
        self._send(self._added, requests)
        return answers

    def cancel(self, requests: Iterable[BatchRequest]) -> None:
        """End the requests that have not ended, without further outputs."""
        ended = [r for r in requests if self._listeners.pop(r, None) is not None]
        if ended:
            self._send(self._cancelled, ended)

    def refuse_new(self) -> None:
        """Accept no more requests; those in progress continue."""
        self._refuses = True

    def fail_all(self, error: OpenELMError) -> None:
        """End all requests with an error."""
        for request, listen in self._listeners.items():
            listen(Output(request, error=error))

    def close(self) -> None:
        """End the thread and wait for it."""
        self._refuses = self._is_closing = True
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _send(self, to: list[BatchRequest], requests: Iterable[BatchRequest]) -> None:
        with self._changed:
            to.extend(requests)
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
            if engine.is_idle and not self._changed.wait_for(self._is_called, IDLE_S):
                release_memory()
                self._changed.wait_for(self._is_called)
            added, cancelled = self._added.copy(), self._cancelled.copy()
            self._added.clear()
            self._cancelled.clear()
        failed = []
        for request in added:
            try:
                engine.add(request)
            except Exception as error:  # must not end the other requests
                failed.append(Output(request, error=as_request_error(error)))
        if cancelled:
            engine.cancel(cancelled)
        return failed

    def _is_called(self) -> bool:
        return bool(self._added or self._cancelled or self._is_closing)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop was closed
            self._is_closing = True

    # In the event loop -----------------------------------------------------------

    def _deliver(self, outputs: list[Output], state: EngineState) -> None:
        self.state = state
        for output in outputs:
            request = output.request
            remove = self._listeners.pop if output.is_last else self._listeners.get
            listen = remove(request, None)
            if listen is not None:
                listen(output)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.fail_all(OpenELMError("The engine has failed."))
        self._on_failure()


class Answers:
    """What the engine adds to the answers to some requests.

    Leaving its block cancels the requests that have not ended.
    """

    def __init__(self, engine: EngineThread, requests: Sequence[BatchRequest]) -> None:
        self._engine, self._requests = engine, requests
        self.outputs: asyncio.Queue[Output] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Output]:
        left = len(self._requests)
        while left:
            output = await self.outputs.get()
            left -= output.is_last
            yield output

    def __enter__(self) -> "Answers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._engine.cancel(self._requests)
