"""What all tests share: MLX at its quickest on Linux, and the project's data."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

import mlx_openelm  # noqa: F401 - loads OpenBLAS, which must come before mlx.core

if sys.platform == "linux":
    # The first mx.compile on the CPU calls the C++ compiler: 13 s or more. A test that
    # needs mx.compile runs in a process of its own, without this variable.
    os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

settings.register_profile("no-deadline", settings(), deadline=None)  # busy machines
settings.load_profile("no-deadline")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of stories, Apple's answers and Llama's tokenizer, where it is there.

    It stands beside the checkout; MLX_OPENELM_SHARED may name another place.
    """
    folder = Path(os.environ.get("MLX_OPENELM_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the shared data: {folder} is not there")
    return folder
