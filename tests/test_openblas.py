"""OpenBLAS gets the kernels of this CPU, also where it does not know the CPU."""

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


def measure(said: str | None) -> dict:
    """Multiply in a fresh process in which `said` is OPENBLAS_CORETYPE."""
    environment = {k: v for k, v in os.environ.items() if k != openblas.CORE_TYPE}
    if said:
        environment[openblas.CORE_TYPE] = said
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env=environment,
        capture_output=True,
        check=True,
        text=True,
    )
    return json.loads(done.stdout)


AVX512 = {"sse2", "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("found", "flags", "kernels"),
    [
        ("Prescott", AVX512, "SkylakeX"),
        ("Prescott", AVX512 - {"avx512vl"}, "Haswell"),
        ("Prescott", {"sse2", "avx"}, None),  # it may well be one
        ("Prescott", set(), None),
        ("SapphireRapids", AVX512, None),
        ("Zen", AVX512, None),
        ("neoversen1", set(), None),
    ],
)
def test_only_an_unknown_cpu_is_told_what_it_can_do(found, flags, kernels):
    assert choose_kernels(found, flags) == kernels


@NEEDS_OPENBLAS
def test_products_are_right_and_no_unknown_cpu_keeps_old_kernels():
    found = measure(None)
    assert choose_kernels(found["kernels"], openblas._cpu_flags()) is None
    assert found["error"] < 1e-4
    assert found["left"] is None


@NEEDS_OPENBLAS
@pytest.mark.skipif(
    not {"avx2", "fma"} <= openblas._cpu_flags(), reason="needs two kinds of kernels"
)
@pytest.mark.parametrize("said", ["Haswell", "Prescott"])
def test_what_a_person_says_wins(said):
    found = measure(said)
    assert (found["kernels"], found["left"]) == (said, said)
    assert found["error"] < 1e-4
