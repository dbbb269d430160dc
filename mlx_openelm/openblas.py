"""On Linux, a fast BLAS under MLX, with the kernels of this CPU.

MLX's Linux CPU wheel brings a reference BLAS. When OpenBLAS is on the system and its
symbols are global before `mlx.core` is loaded, MLX's matrix products go through it (3
against 130 GFLOP/s, measured on two cores); loaded afterwards it has no effect. So this
is done when the package is imported, and nothing else is.

An OpenBLAS that is older than the CPU does not know it and takes kernels of 2004, whose
vectors are 4 floats long (0.3.21, Debian 12, on a Xeon of 2023: 20 GFLOP/s; told to
take SkylakeX's, 95). Then it is loaded again and told what the CPU can do.
"""

import _ctypes
import contextlib
import ctypes
import os
import sys
from collections.abc import Set
from enum import StrEnum
from pathlib import Path

LIBRARY = "libopenblas.so.0"
CORE_TYPE = "OPENBLAS_CORETYPE"  # read by OpenBLAS while it is loaded
_UNKNOWN = "Prescott"  # what it takes for a CPU that it does not know
_NEEDS = {
    "SkylakeX": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "Haswell": {"avx2", "fma"},
}


class BLAS(StrEnum):
    """What MLX's matrix products go through on this machine."""

    OWN = "MLX's own"
    OPENBLAS = "OpenBLAS"
    MISSING = "the reference BLAS (OpenBLAS is not installed)"
    TOO_LATE = "the reference BLAS (mlx.core was imported before mlx_openelm)"


def load_openblas() -> tuple[BLAS, ctypes.CDLL | None]:
    """Load OpenBLAS with global symbols, if it is there and there is still time.

    Returns:
        What is used, and OpenBLAS if it is that.
    """
    if sys.platform != "linux":
        return BLAS.OWN, None
    if "mlx.core" in sys.modules:
        return BLAS.TOO_LATE, None
    try:
        library = ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
        better = choose_kernels(_kernels(library), _cpu_flags())
        if better and CORE_TYPE not in os.environ:
            _ctypes.dlclose(library._handle)
            os.environ[CORE_TYPE] = better
            library = ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
            del os.environ[CORE_TYPE]  # it is for no other library or process
    except OSError:
        return BLAS.MISSING, None
    return BLAS.OPENBLAS, library


def choose_kernels(found: str, flags: Set[str]) -> str | None:
    """Return the kernels to ask for instead of those found; None if these will do.

    Args:
        flags: what the CPU can do, in the words of /proc/cpuinfo.
    """
    if found != _UNKNOWN:
        return None
    return next((name for name, needed in _NEEDS.items() if needed <= flags), None)


def _kernels(library: ctypes.CDLL) -> str:
    name = library.openblas_get_corename
    name.restype = ctypes.c_char_p
    return bytes(name()).decode()


def _cpu_flags() -> frozenset[str]:
    """Return the flags of the first CPU, none where they are not told (not x86)."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def use_threads(most: int | None) -> None:
    """Let the following products run on `most` threads, or on all that there are.

    To share a small product costs more than it brings: threads wait for each other
    between two of them, at the expense of what feeds them.
    """
    if _LIBRARY is not None:
        _LIBRARY.openblas_set_num_threads(min(most or THREADS, THREADS))


ACTIVE, _LIBRARY = load_openblas()
KERNELS = _kernels(_LIBRARY) if _LIBRARY else ""  # their name
THREADS = int(_LIBRARY.openblas_get_num_threads()) if _LIBRARY else 0
