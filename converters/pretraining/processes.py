"""The processes of a run: a single one, or those of torchrun or Slurm.

An error or signal in one process must reach all, or the others would wait for it
indefinitely: errors are raised in each, and signals stop all at the same step.
"""

import contextlib
import gc
import itertools
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import describe_failure

PEER_TIMEOUT = timedelta(minutes=30)  # of a collective operation; saving takes minutes
POLL_SECONDS = 0.1


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
def join_processes(limit: float) -> Iterator[Processes]:
    """Join the process group of torchrun or Slurm; without one, a single process.

    Args:
        limit: seconds in which all processes must have started.

    Raises:
        OpenELMError: some have not started; they are named.
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
    rank = int(os.environ.get("RANK", "0"))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=meet_processes(rank, count, limit),
        rank=rank,
        world_size=count,
        timeout=PEER_TIMEOUT,
    )
    try:
        yield Processes(rank, count, device)
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


_LOST = (
    *("onnection closed by peer", "onnection reset by peer", "Broken pipe"),
    *("Timed out waiting", "timed out after"),
)


_PORT = "mlx_openelm/port"  # key, in torchrun's store, of the port of process 0's store


# The start of all processes ----------------------------------------------------------


def meet_processes(rank: int, count: int, limit: float) -> dist.Store:
    """Return a store that all processes have reached, each with its host's name.

    Process 0 serves it. torch.distributed would wait in the same way,
    but its error does not name the processes that are missing.

    Raises:
        OpenELMError: some did not start within `limit` seconds, or the first one cannot
            be reached.
    """
    deadline = time.monotonic() + limit
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise OpenELMError(
            f"WORLD_SIZE is {count}, but MASTER_ADDR and MASTER_PORT do not name the "
            "first process; start the run with torchrun, or with Slurm as in "
            "recipes/pretrain/slurm.sh."
        ) from error
    try:
        store = _open_store(rank, host, port, count, limit)
        store.set(f"host/{rank}", socket.gethostname())
        store.add("started", 1)
        while store.add("started", 0) < count:
            if time.monotonic() > deadline:
                message = _name_missing(store, count, limit)
                raise (SharedError if rank else OpenELMError)(message)
            time.sleep(POLL_SECONDS)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise SharedError(f"Process 0 on {host} ended; see its message.") from error
    return store


def _open_store(
    rank: int, host: str, port: int, count: int, limit: float
) -> dist.Store:
    """Return the store of this start of the processes.

    torchrun's own store outlives them, with the addresses of processes that were
    killed: there, process 0 only publishes the port of a new store.
    """

    def connect(port: int, *, serves: bool = False) -> dist.TCPStore:
        return dist.TCPStore(
            *(host, port, count, serves),
            timeout=PEER_TIMEOUT,
            wait_for_workers=False,
        )

    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank or shared:
        _wait_for_server(rank, host, port, limit)
    if not shared:
        return connect(port, serves=rank == 0)
    agent = connect(port)
    if rank == 0:
        store = connect(0, serves=True)
        agent.set(_PORT, str(store.port))
        return store
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if agent.check([_PORT]):
            port = int(agent.get(_PORT))
            with (  # the port of an earlier start refuses connections
                contextlib.suppress(OSError),
                socket.create_connection((host, port), timeout=limit),
            ):
                return connect(port)
        time.sleep(POLL_SECONDS)
    raise OpenELMError(
        f"Process 0 on {host} did not start within {limit:,.0f} seconds; see its "
        "messages, or set a longer join_timeout."
    )


def _wait_for_server(rank: int, host: str, port: int, limit: float) -> None:
    """Return as soon as a connection succeeds; torch would print each failure."""
    deadline = time.monotonic() + limit
    while True:
        try:
            with socket.create_connection((host, port), timeout=limit):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise OpenELMError(
                    f"Process {rank} on {socket.gethostname()} could not reach process "
                    f"0 at {host}, port {port}, within {limit:,.0f} seconds ({error}); "
                    "start that node, check MASTER_ADDR, or set a longer join_timeout."
                ) from error
            time.sleep(POLL_SECONDS)


def _name_missing(store: dist.Store, count: int, limit: float) -> str:
    hosts: dict[str, list[int]] = {}
    missing = []
    for rank in range(count):
        if store.check([f"host/{rank}"]):
            name = store.get(f"host/{rank}").decode()
            hosts.setdefault(name, []).append(rank)
        else:
            missing.append(rank)
    started = "; ".join(f"{_spell(ranks)} on {name}" for name, ranks in hosts.items())
    return (
        f"Of {count} processes, {len(missing)} did not start within {limit:,.0f} "
        f"seconds: {_spell(missing)}. Started: {started}. Start the others, or set a "
        "longer join_timeout."
    )


def _spell(ranks: list[int]) -> str:
    """Return ranks with ranges: "0, 8 to 15"."""
    parts = []
    for _, group in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        run = [rank for _, rank in group]
        parts.append(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ", ".join(parts)


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
