"""What this machine computes with: back end, dtype, memory."""

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx

from mlx_openelm import openblas


def runs_on_gpu() -> bool:
    """Whether MLX computes on a GPU: Metal's or CUDA's."""
    return mx.default_device().type == mx.DeviceType.gpu


def runs_on_linux_cpu() -> bool:
    """Whether MLX computes on its Linux CPU back end, quick in float32 only."""
    return sys.platform == "linux" and not runs_on_gpu()


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """Return the dtype that weights stored as `stored` are computed in here.

    As stored, but float32 on the Linux CPU: 270M decodes there at 0.4 tokens/s from
    4-bit bfloat16 and at 8.8 from float32 (measured).
    """
    return mx.float32 if runs_on_linux_cpu() else stored


def describe_slowness(stored: mx.Dtype, *, quantized: bool) -> list[str]:
    """Return what a person should know of this machine before running a model."""
    if not runs_on_linux_cpu():
        return []
    notes = []
    if quantized or stored != mx.float32:
        notes.append("weights are widened to float32, which the Linux CPU is quick in")
    if openblas.ACTIVE != openblas.BLAS.OPENBLAS:
        notes.append(
            f"matrix products go through {openblas.ACTIVE}; prompts are 10 times "
            "faster with OpenBLAS (Debian, Ubuntu: apt install libopenblas0-pthread)"
        )
    return notes


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine, for a report."""

    system: str
    python: str
    mlx: str
    device: str
    blas: str
    memory_bytes: int  # what a process should stay below, by Metal; else all there is


def describe_machine() -> Machine:
    """Return what a report of this machine needs."""
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
