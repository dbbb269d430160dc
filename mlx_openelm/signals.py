"""Deferred handling of Ctrl-C and SIGTERM."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any


@dataclass(slots=True)
class Stop:
    """The signal that was received, if any."""

    number: int | None = None
    handlers: dict[int, Any] = field(default_factory=dict)


@contextlib.contextmanager
def deferred_signals() -> Iterator[Stop]:
    """Defer the first Ctrl-C or SIGTERM until the step is done; a second one acts."""
    stop = Stop()

    def remember(number: int, frame: FrameType | None) -> None:
        stop.number = number
        signal.signal(number, stop.handlers[number])

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    for number in map(int, (signal.SIGINT, signal.SIGTERM)):
        stop.handlers[number] = signal.getsignal(number)
        signal.signal(number, remember)
    try:
        yield stop
    finally:
        for number, handler in stop.handlers.items():
            signal.signal(number, handler)
