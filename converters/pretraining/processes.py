"""The processes of a run: a single one, or those of torchrun.

An error or signal in one process must reach all, or the others would wait for it
indefinitely: errors are raised in each, and signals stop all at the same step.
"""

import contextlib
import gc
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import describe_failure


class SharedError(OpenELMError):
    """An error that is raised in all processes; only the first needs to report it."""


@dataclass(frozen=True, slots=True)
class Processes:
    """Rank and device of this process, and the number of processes."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Return the sums over all processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, ordered by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Raise an error of one process in all; the block must not communicate.

        Raises:
            SharedError: with the message of the lowest rank that failed. A single
                process raises its own error.
        """
        failed: Exception | None = None
        try:
            yield
        except (OpenELMError, OSError) as error:
            if self.count == 1:
                raise
            failed = error
        self.share_error(failed)

    def share_error(self, failed: Exception | None) -> None:
        """Raise the error of any process in all; None: this one has none."""
        if failed is not None and self.count == 1:
            raise failed
        own = None if failed is None else describe_failure(failed)
        for message in self.gather(own):
            if message is not None:
                raise SharedError(message) from failed

    def agree_to_stop(self, signals: list[int]) -> bool:
        """Return whether any process got a signal, and put it into `signals`."""
        if self.count > 1:
            number = torch.tensor([signals[0] if signals else 0], device=self.device)
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
            if number.item():  # later signals are handled at the next step
                signals[:] = [int(number.item())]
                return True
            return False
        return bool(signals)


@contextlib.contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the process group of torchrun; without torchrun, a single process.

    Raises:
        SharedError: another process ended while this one was waiting for it.
    """
    cuda = torch.cuda.is_available()
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if count == 1:
        yield Processes(0, 1, device)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(dist.get_rank(), count, device)
    except BaseException as error:
        for each in filter(None, (error, error.__cause__)):
            traceback.clear_frames(each.__traceback__)
        if isinstance(error, RuntimeError) and any(x in str(error) for x in _LOST):
            raise SharedError(
                "Another process of the run ended; see its message. The last "
                "checkpoint is complete: continue with `resume`."
            ) from error
        raise
    finally:
        gc.collect()  # freeing objects of the group after its end may hang
        dist.destroy_process_group()


_LOST = ("onnection closed by peer", "onnection reset by peer", "Broken pipe")


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, to be checked after each step."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen  # only the main thread receives signals
        return
    before = {
        number: signal.signal(number, lambda received, frame: seen.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
