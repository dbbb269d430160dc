"""The back end, dtype and memory of this machine."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx

from mlx_openelm import openblas

FORCED_PATH = "MLX_OPENELM_GPU_PATH"  # environment variable; its value has no meaning


def runs_on_gpu() -> bool:
    """Return whether MLX computes on a GPU (Metal or CUDA)."""
    return mx.default_device().type == mx.DeviceType.gpu


def takes_gpu_path() -> bool:
    """Return whether operations and shapes are those for a GPU.

    The tests force them on the CPU, by an environment variable, to check their results.
    """
    return runs_on_gpu() or FORCED_PATH in os.environ


def runs_on_linux_cpu() -> bool:
    """Return whether operations are those for MLX's Linux CPU back end.

    It is fast only in float32.
    """
    return sys.platform == "linux" and not takes_gpu_path()


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """Return the dtype in which this machine computes with weights stored as `stored`.

    The stored dtype, or float32 on the Linux CPU, where 270M decodes at 0.4 tokens/s in
    4-bit bfloat16 and at 8.8 in float32 (measured).
    """
    return mx.float32 if runs_on_linux_cpu() else stored


def describe_slowness(stored: mx.Dtype, *, quantized: bool) -> list[str]:
    """Return notes on the speed of this machine, for the user."""
    if not runs_on_linux_cpu():
        return []
    notes = []
    if quantized or stored != mx.float32:
        notes.append("computing in float32, which is faster on this CPU")
    if openblas.ACTIVE != openblas.BLAS.OPENBLAS:
        notes.append(
            f"matrix products use {openblas.ACTIVE}; prompts are 10 times faster with "
            "OpenBLAS (Debian, Ubuntu: apt install libopenblas0-pthread)"
        )
    return notes


def release_memory() -> None:
    """Return memory that is no longer used to the system."""
    mx.clear_cache()
    if sys.platform == "linux":
        # glibc keeps freed memory; musl has no such function.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextmanager
def wired_memory(wired: bool = True) -> Iterator[None]:
    """Wire as much memory as the GPU is recommended to use (Metal only)."""
    before = wire_memory() if wired else None
    try:
        yield
    finally:
        if before is not None:
            mx.set_wired_limit(before)


def wire_memory() -> int | None:
    """Do as `wired_memory` until the end; return the limit before, on Metal."""
    limit = mx.device_info().get("max_recommended_working_set_size", 0)
    if not (runs_on_gpu() and limit):
        return None
    before: int = mx.set_wired_limit(int(limit))
    return before


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine, for a report."""

    system: str
    python: str
    mlx: str
    device: str
    blas: str
    memory_bytes: int  # Metal's recommended working set; else the physical memory


def describe_machine() -> Machine:
    """Return a description of this machine for a report."""
    backend = "CPU"
    if runs_on_gpu():
        backend = "Metal" if sys.platform == "darwin" else "CUDA"
    info = mx.device_info()
    name = str(info.get("device_name", platform.processor() or platform.machine()))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = info.get("max_recommended_working_set_size", physical)
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        mlx=version("mlx"),
        device=f"{backend} ({name})",
        blas=str(openblas.ACTIVE),
        memory_bytes=int(limit),
    )
