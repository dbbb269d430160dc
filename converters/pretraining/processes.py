"""The processes of a run: one alone, or those that torchrun started.

What one of them meets must reach all, or the others wait for it without end: an error
in one is raised in each, and a signal to one stops all at the same step.
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


class SharedError(OpenELMError):
    """Raised in all processes of a run; the first one alone need say it."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of the run, and the device that it computes on."""

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
        """Return every process's value, the first's first."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise in all what fails in one; inside the block no process may wait.

        Raises:
            SharedError: the first process's that had one; alone, its own error.
        """
        failed: Exception | None = None
        try:
            yield
        except (OpenELMError, OSError) as error:
            if self.count == 1:
                raise
            failed = error
        self.share(failed)

    def share(self, failed: Exception | None) -> None:
        """Raise in all processes what failed in one of them; None: nothing here."""
        if failed is not None and self.count == 1:
            raise failed
        said = self.gather(None if failed is None else f"{failed}".rstrip(".") + ".")
        for message in said:
            if message is not None:
                raise SharedError(message) from failed

    def agree_to_stop(self, signals: list[int]) -> bool:
        """Stop all at the same step, whichever got the signal."""
        if self.count > 1:
            asked = torch.tensor([signals[0] if signals else 0], device=self.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            if asked.item():  # else leave one that came just now for the next time
                signals[:] = [int(asked.item())]
                return True
            return False
        return bool(signals)


@contextlib.contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started; alone otherwise.

    Raises:
        SharedError: another process ended while this one waited for it.
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
                "Another process of the run ended, so this one cannot go on; its own "
                "message says why. The last checkpoint is whole: say `resume`."
            ) from error
        raise
    finally:
        gc.collect()  # what hangs on the group and is freed after it may never end
        dist.destroy_process_group()


_LOST = ("onnection closed by peer", "onnection reset by peer", "Broken pipe")


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM in a list, to be looked at between two steps."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen  # signals reach the main thread alone
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
