"""Environment variables and fixtures of all tests."""

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from places import SHARED

# The models are small, and the workers of pytest-xdist share the cores. It is read when
# OpenBLAS and PyTorch are loaded, here and in the processes that tests start.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import mlx_openelm  # loads OpenBLAS before a test imports mlx.core

if sys.platform == "linux":
    # The first mx.compile on the CPU calls the C++ compiler: 13 s or more. A test that
    # needs mx.compile runs in a process of its own, without this variable.
    os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

os.environ["MLX_OPENELM_TUNING"] = "no-settings.json"  # not those of the developer

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests of the Hub use a local server

settings.register_profile("no-deadline", settings(), deadline=None)  # busy machines
settings.load_profile("no-deadline")


def pytest_collection_finish() -> None:
    """Leave the imported modules out of each garbage collection: it takes 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The project's data; a test that needs it skips where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data: {SHARED} is not there")
    return SHARED


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a "source" to convert, and the "model" converted from it."""
    from commands import make_source

    folder = tmp_path_factory.mktemp("converted")
    mlx_openelm.convert(make_source(folder / "source"), folder / "model")
    return folder


@pytest.fixture(scope="module", autouse=True)
def without_drawings() -> Iterator[None]:
    """Leave out the drawings in reports of runs; modules that test them override it."""
    from reports import draw_nothing

    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch.setattr)
        yield


@pytest.fixture
def here(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of one test, with a copy of `converted`."""
    shutil.copytree(converted, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"
