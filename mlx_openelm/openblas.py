"""On Linux, a fast BLAS under MLX.

MLX's Linux CPU wheel brings a reference BLAS. When OpenBLAS is on the system and its
symbols are global before `mlx.core` is loaded, MLX's matrix products go through it (3
against 130 GFLOP/s, measured on two cores); loaded afterwards it has no effect. So this
is done when the package is imported, and nothing else is.
"""

import ctypes
import sys
from enum import StrEnum


class BLAS(StrEnum):
    """What MLX's matrix products go through on this machine."""

    OWN = "MLX's own"
    OPENBLAS = "OpenBLAS"
    MISSING = "the reference BLAS (OpenBLAS is not installed)"
    TOO_LATE = "the reference BLAS (mlx.core was imported before mlx_openelm)"


def load_openblas() -> BLAS:
    """Load OpenBLAS with global symbols, if it is there and there is still time."""
    if sys.platform != "linux":
        return BLAS.OWN
    if "mlx.core" in sys.modules:
        return BLAS.TOO_LATE
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return BLAS.MISSING
    return BLAS.OPENBLAS


ACTIVE = load_openblas()
