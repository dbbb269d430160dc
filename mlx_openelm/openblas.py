"""Loads OpenBLAS for MLX on Linux, with the kernels of this CPU.

MLX's Linux CPU wheel contains a reference BLAS. If OpenBLAS is loaded with global
symbols before `mlx.core`, MLX uses it for matrix products (130 instead of 3 GFLOP/s,
measured on two cores). Loaded later it has no effect, so it is loaded when the package
is imported.

An OpenBLAS older than the CPU falls back to kernels of 2004 with vectors of 4 floats
(0.3.21 of Debian 12 on a Xeon of 2023: 20 GFLOP/s; with SkylakeX kernels 95). In that
case it is loaded again, with the kernel type set.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Set
from enum import StrEnum
from pathlib import Path

LIBRARY = "libopenblas.so.0"
CORE_TYPE = "OPENBLAS_CORETYPE"  # read by OpenBLAS while it is loaded
_FALLBACK = "Prescott"  # the kernels for unsupported CPUs
_NEEDS = {
    "SkylakeX": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "Haswell": {"avx2", "fma"},
}


class BLAS(StrEnum):
    """The BLAS library that MLX uses on this machine."""

    OWN = "MLX's own"
    OPENBLAS = "OpenBLAS"
    MISSING = "the reference BLAS (OpenBLAS is not installed)"
    TOO_LATE = "the reference BLAS (mlx.core was imported before mlx_openelm)"


def load_openblas() -> tuple[BLAS, ctypes.CDLL | None]:
    """Load OpenBLAS with global symbols, unless it is missing or it is too late.

    Returns:
        The library in use; its handle if it is OpenBLAS.
    """
    if sys.platform != "linux":
        return BLAS.OWN, None
    if "mlx.core" in sys.modules:
        return BLAS.TOO_LATE, None
    try:
        handle = _open_library()
        library = ctypes.CDLL(LIBRARY, handle=handle)
        better = choose_kernels(_kernels(library), _cpu_flags())
        if better and CORE_TYPE not in os.environ:
            ctypes.CDLL(None).dlclose(ctypes.c_void_p(handle))
            os.environ[CORE_TYPE] = better
            library = ctypes.CDLL(LIBRARY, handle=_open_library())
            del os.environ[CORE_TYPE]  # other libraries and processes must not see it
    except OSError:
        return BLAS.MISSING, None
    return BLAS.OPENBLAS, library


def choose_kernels(current: str, flags: Set[str]) -> str | None:
    """Return better kernels than the current ones for this CPU, or None.

    Args:
        flags: the features of the CPU, as in /proc/cpuinfo.
    """
    if current != _FALLBACK:
        return None
    return next((name for name, needed in _NEEDS.items() if needed <= flags), None)


def _open_library() -> int:
    """Return the handle of OpenBLAS, loaded with global symbols.

    `ctypes.CDLL` would keep the handle to itself, and it is needed to unload it.
    """
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    handle: int | None = dlopen(LIBRARY.encode(), os.RTLD_GLOBAL | os.RTLD_NOW)
    if handle is None:
        raise OSError(f"{LIBRARY} cannot be loaded")
    return handle


def _kernels(library: ctypes.CDLL) -> str:
    name = library.openblas_get_corename
    name.restype = ctypes.c_char_p
    return bytes(name()).decode()


def _cpu_flags() -> frozenset[str]:
    """Return the feature flags of the first CPU; empty on other CPUs than x86."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def use_threads(limit: int | None) -> None:
    """Limit the threads of later matrix products; None is all.

    For small products, synchronizing the threads takes longer than it saves.
    """
    if _LIBRARY is not None:
        _LIBRARY.openblas_set_num_threads(min(limit or THREADS, THREADS))


ACTIVE, _LIBRARY = load_openblas()
KERNELS = _kernels(_LIBRARY) if _LIBRARY else ""
THREADS = int(_LIBRARY.openblas_get_num_threads()) if _LIBRARY else 0
