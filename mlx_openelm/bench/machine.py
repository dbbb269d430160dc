"""Properties of the machine for `bench`: memory bandwidth, free memory, compilation."""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_openelm.device import describe_machine, runs_on_gpu, runs_on_linux_cpu


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Memory bandwidth, measured by reading an array with MLX.

    Attributes:
        bytes_per_second: best round of the fastest operation.
        way: the fastest operation.
        ways: bytes per second of the best round of each operation.
    """

    bytes_per_second: float
    way: str
    ways: Mapping[str, float]
    num_bytes: int
    rounds: int


def measure_bandwidth(num_bytes: int | None = None, rounds: int = 5) -> Bandwidth:
    """Measure how fast MLX reads an array larger than the processor caches.

    The fastest operation depends on the device (on the CPU a sum uses one thread, a
    matrix product all of them), so the best of several operations counts.

    Args:
        num_bytes: size of the array; default 1 GiB on a GPU and 512 MiB on the CPU, or
            less if memory is short.
    """
    if num_bytes is None:
        enough = 2**30 if runs_on_gpu() else 2**29
        num_bytes = max(2**28, min(enough, available_memory() // 8))
    ways = _time_reads(num_bytes, rounds)
    mx.clear_cache()
    way = max(ways, key=lambda name: ways[name])
    return Bandwidth(ways[way], way, ways, num_bytes, rounds)


def _time_reads(num_bytes: int, rounds: int) -> dict[str, float]:
    """Return the bytes per second of the best round of each operation."""
    width = 2048
    matrix = mx.ones((max(1, num_bytes // (4 * width)), width), mx.float32)
    row, column = mx.ones((1, width)), mx.ones((1, matrix.shape[0]))
    mx.eval(matrix, row, column)
    ways: dict[str, tuple[Callable[[], mx.array], int]] = {
        "a sum": (lambda: matrix.sum(), 1),
        "a copy": (lambda: matrix + 1, 2),  # reads and writes
        "a product with its rows": (lambda: row @ matrix.T, 1),
        "a product with its columns": (lambda: column @ matrix, 1),
    }
    speeds = {}
    for name, (run, passes) in ways.items():
        mx.eval(run())
        best = math.inf
        for _ in range(rounds):
            started = time.perf_counter()
            mx.eval(run())
            best = min(best, time.perf_counter() - started)
        speeds[name] = passes * matrix.nbytes / best
    return speeds


def available_memory() -> int:
    """Return the bytes of memory that are available for a model."""
    free = mx.device_info().get("free_memory")  # on CUDA devices
    if isinstance(free, int) and free > 0:
        return free
    meminfo = Path("/proc/meminfo")
    if runs_on_linux_cpu() and meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return describe_machine().memory_bytes


def is_compiled() -> bool:
    """Whether decoding steps are compiled with mx.compile on this device."""
    return runs_on_gpu() and os.environ.get("MLX_DISABLE_COMPILE") is None
