"""The self-check passes on a correct machine and fails on a faulty one."""

import os
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
from places import ROOT

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from mlx_openelm.bench import selfcheck as benchmark
from mlx_openelm.bench.plan import PROMPT
from mlx_openelm.bench.selfcheck import GOLDEN, check_machine
from mlx_openelm.model import openelm, token_layout


def test_this_machine_passes():
    report = check_machine()
    assert report.passed, report.checks
    assert len(report.checks) == 7
    assert report.text.startswith(PROMPT)
    assert report.text == (GOLDEN / "demo.txt").read_text()
    assert report.machine.device


def failed(report):
    return {check.name for check in report.checks if not check.passed}


def test_a_wrong_activation_is_detected(monkeypatch):
    original = openelm.swiglu
    monkeypatch.setattr(openelm, "swiglu", lambda gate, up: original(up, gate))
    report = check_machine()
    assert not report.passed
    assert "Apple's logits of gpt-test, float32" in failed(report)
    assert "the demo's text differs (1: yes)" in failed(report)


def test_a_wrong_cache_is_detected(monkeypatch):
    original = token_layout.rotation_after
    monkeypatch.setattr(
        token_layout, "rotation_after", lambda offset, *given: original(0, *given)
    )
    assert "cached against uncached, logits" in failed(check_machine())


def test_wrong_quantized_kernels_are_detected(monkeypatch):
    original = nn.QuantizedLinear.__call__
    monkeypatch.setattr(
        nn.QuantizedLinear, "__call__", lambda self, x: original(self, x) * 1.01
    )
    assert failed(check_machine()) == {"4-bit kernels against unpacked, logits"}


def test_nan_does_not_pass(monkeypatch):
    monkeypatch.setattr(benchmark, "_reference_difference", lambda: float("nan"))
    assert failed(check_machine()) == {"Apple's logits of gpt-test, float32"}


@pytest.mark.proof
@pytest.mark.skipif(sys.platform != "linux", reason="compiled on all other platforms")
def test_the_compiled_path_passes():
    root = ROOT
    environment = {k: v for k, v in os.environ.items() if k != "MLX_DISABLE_COMPILE"}
    done = subprocess.run(
        [sys.executable, "-m", "mlx_openelm", "selfcheck", "--json"],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_packaged_logits_are_the_first_columns_of_the_golden_file():
    from models import read_golden
    from safetensors.numpy import load_file

    metadata, _, tokens, positions, logits = read_golden("gpt-test")
    carried = load_file(GOLDEN / "gpt-test.safetensors")
    assert (carried["tokens"] == tokens).all()
    assert (carried["positions"] == positions).all()
    assert (carried["logits"] == logits[..., :2048]).all()
    assert mx.array(carried["logits"]).shape[-1] == 2048
    assert metadata["seed"] == "7"
