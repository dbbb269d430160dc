"""The import contracts of pyproject.toml, each broken by a forbidden import."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

pytestmark = pytest.mark.proof

FORBIDDEN = {
    "A package imports only packages of lower layers": (
        "mlx_openelm/model/lora.py",
        "import mlx_openelm.storage.loading",
    ),
    "No cycles inside a package": (
        "mlx_openelm/generation/cache.py",
        "import mlx_openelm.generation.batching.answering",
    ),
    "Only the command line and the lazy public names import converters": (
        "mlx_openelm/bench/plan.py",
        "import converters.formats.sources",
    ),
    "torch is imported by the reference, parity and pre-training alone": (
        "mlx_openelm/training/step.py",
        "import torch",
    ),
    "Pre-training runs, and reports are drawn, where mlx is not installed": (
        "converters/pretraining/packing.py",
        "import mlx.core",
    ),
}


def broken_contracts(checkout: Path) -> set[str]:
    output = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    ).stdout
    assert " KEPT" in output or " BROKEN" in output, output
    return set(re.findall(r"^(.+) BROKEN\b", output, re.MULTILINE))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("mlx_openelm", "converters"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_all_contracts_are_kept(checkout):
    assert broken_contracts(checkout) == set()


@pytest.mark.parametrize("contract", FORBIDDEN)
def test_a_forbidden_import_breaks_its_contract(checkout, contract):
    module, line = FORBIDDEN[contract]
    file = checkout / module
    file.write_text(f"{file.read_text()}\n{line}\n")
    assert contract in broken_contracts(checkout)


def test_no_module_and_no_folder_is_too_large():
    modules = [*(ROOT / "mlx_openelm").rglob("*.py"), *(ROOT / "converters").rglob("*")]
    modules = [file for file in modules if file.suffix == ".py"]
    assert not [m for m in modules if len(m.read_text().splitlines()) > 450]
    for folder in {module.parent for module in modules}:
        assert len([*folder.glob("*.py")]) <= 24 + 1, folder  # and __init__.py
