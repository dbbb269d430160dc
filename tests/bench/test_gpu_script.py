"""benchmarks/gpu.sh, with a program for Python that prints its arguments."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def measure(folder, *arguments, **variables):
    python = folder / "a python"
    python.write_text('#!/bin/sh\nfor each in "$@"; do echo "[$each]"; done\n')
    python.chmod(0o755)
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env=os.environ | {"PYTHON": str(python)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_folder_may_have_spaces_in_its_name(tmp_path):
    out = tmp_path / "a folder"
    done = measure(tmp_path, str(out), SIZES="270M 1.1B")
    assert done.returncode == 0, done.stderr
    for name in ("270M", "270M-4bit", "1.1B", "1.1B-4bit"):
        passed = (out / f"against-{name}.json").read_text()
        assert f"[--model]\n[{out}/models/{name}]\n" in passed


def test_without_sizes_the_demo_is_measured(tmp_path):
    out = tmp_path / "out"
    assert measure(tmp_path, str(out), SIZES="").returncode == 0
    assert [each.name for each in out.glob("against-*.json")] == ["against-demo.json"]


def test_missing_wheels_end_it_before_it_measures(tmp_path):
    out = tmp_path / "out"
    done = measure(tmp_path, str(out), str(tmp_path / "wheels"))
    assert done.returncode != 0
    assert "wheels" in done.stderr
    assert not list(out.iterdir())
