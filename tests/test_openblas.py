"""OpenBLAS uses the kernels of this CPU, even if it is older than the CPU."""

import json
import os
import subprocess
import sys

import pytest

from mlx_openelm import openblas
from mlx_openelm.openblas import BLAS, choose_kernels

NEEDS_OPENBLAS = pytest.mark.skipif(
    openblas.ACTIVE != BLAS.OPENBLAS, reason="OpenBLAS is not used here"
)
MEASURE = """
import json, os
from mlx_openelm import openblas
import numpy as np
import mlx.core as mx
a, b = (np.random.default_rng(i).standard_normal((200, 300)) for i in range(2))
product = np.array(mx.array(a.astype(np.float32)) @ mx.array(b.astype(np.float32)).T)
print(json.dumps({
    "kernels": openblas.KERNELS,
    "error": float(abs(product - a @ b.T).max()),
    "left": os.environ.get("OPENBLAS_CORETYPE"),
}))
"""


def measure(core_type: str | None) -> dict:
    """Multiply in a new process with this OPENBLAS_CORETYPE."""
    environment = {k: v for k, v in os.environ.items() if k != openblas.CORE_TYPE}
    if core_type:
        environment[openblas.CORE_TYPE] = core_type
    result = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env=environment,
        capture_output=True,
        check=True,
        text=True,
    )
    return json.loads(result.stdout)


AVX512 = {"sse2", "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("current", "flags", "better"),
    [
        ("Prescott", AVX512, "SkylakeX"),
        ("Prescott", AVX512 - {"avx512vl"}, "Haswell"),
        ("Prescott", {"sse2", "avx"}, None),  # the right kernels for this CPU
        ("Prescott", set(), None),
        ("SapphireRapids", AVX512, None),
        ("Zen", AVX512, None),
        ("neoversen1", set(), None),
    ],
)
def test_only_fallback_kernels_are_replaced(current, flags, better):
    assert choose_kernels(current, flags) == better


@NEEDS_OPENBLAS
def test_products_are_right_and_kernels_are_up_to_date():
    measured = measure(None)
    assert choose_kernels(measured["kernels"], openblas._cpu_flags()) is None
    assert measured["error"] < 1e-4
    assert measured["left"] is None


@NEEDS_OPENBLAS
@pytest.mark.skipif(
    not {"avx2", "fma"} <= openblas._cpu_flags(), reason="needs two kinds of kernels"
)
@pytest.mark.parametrize("core_type", ["Haswell", "Prescott"])
def test_the_environment_variable_overrides_the_choice(core_type):
    measured = measure(core_type)
    assert (measured["kernels"], measured["left"]) == (core_type, core_type)
    assert measured["error"] < 1e-4


@NEEDS_OPENBLAS
def test_converters_load_openblas_before_mlx():
    """A script that imports the converters first does not get the reference BLAS."""
    code = (
        "from converters.quantization import learning\n"
        "from mlx_openelm import openblas\n"
        "print(openblas.ACTIVE)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert result.stdout.strip() == BLAS.OPENBLAS
