"""Runs of compiled updates with padded batches end with the same bytes if resumed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import make_source

from mlx_openelm.device import FORCED_PATH
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.run import finetune
from mlx_openelm.training.events import read_events
from mlx_openelm.training.state import load_state
from mlx_openelm.tuning import DEFAULT, Tuning

STEPS = 6


@pytest.fixture
def recipe(tmp_path) -> FinetuneRecipe:
    data = tmp_path / "train.jsonl"
    records = [
        {"prompt": f"the king {i} " * (1 + i % 5), "completion": f"gold {i % 3}!"}
        for i in range(24)
    ]
    data.write_text("\n".join(map(json.dumps, records)))
    return FinetuneRecipe(
        data=str(data),
        model=str(make_source(tmp_path / "base")),
        adapter_path=str(tmp_path / "run"),
        rank=4,
        num_layers=1,
        iters=STEPS,
        batch_size=4,
        learning_rate=3e-3,
        dropout=0.1,
        steps_per_report=1,
        save_every=2,
    )


def weights(folder: Path) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


def whole(recipe, tuning):
    folder = Path(recipe.adapter_path).with_name(f"whole-{tuning.compiled_training}")
    uninterrupted = dataclasses.replace(recipe, adapter_path=str(folder))
    return weights(finetune(uninterrupted, tuning=tuning).path)


def stop_and_resume(recipe, first, second):
    """Run to step 3 with settings, and the rest with others; return the bytes."""

    def interrupt(event):
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, tuning=first, on_event=interrupt)
    return weights(finetune(recipe, resume=True, tuning=second).path)


@pytest.mark.parametrize(
    "changes",
    [
        {"grad_accumulation_steps": 2},
        pytest.param({}, marks=pytest.mark.proof),
        pytest.param({"fine_tune_type": "full"}, marks=pytest.mark.proof),
    ],
    ids=str,
)
def test_a_compiled_run_resumes_bit_identically(monkeypatch, recipe, changes):
    monkeypatch.setenv(FORCED_PATH, "1")
    recipe = dataclasses.replace(recipe, **changes)
    assert stop_and_resume(recipe, DEFAULT, DEFAULT) == whole(recipe, DEFAULT)


@pytest.mark.parametrize("forced", [True, pytest.param(False, marks=pytest.mark.proof)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_resumes_on_its_path_whatever_the_machine_chooses(
    monkeypatch, recipe, forced, compiled
):
    if forced:
        monkeypatch.setenv(FORCED_PATH, "1")
    own, other = (Tuning(compiled_training=c) for c in (compiled, not compiled))
    resumed = stop_and_resume(recipe, own, other)
    assert resumed == whole(recipe, own)
    assert resumed != whole(recipe, other)  # the paths differ in rounding


def run_lora(recipe, *options):
    """Start the command with compiled functions, in a process of its own."""
    environment = {**os.environ, FORCED_PATH: "1"}
    environment.pop("MLX_DISABLE_COMPILE", None)
    path = Path(recipe.adapter_path).with_suffix(".yaml")
    path.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "mlx_openelm", "lora", "-c", str(path), *options]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.proof
def test_a_command_with_compiled_functions_resumes_bit_identically(recipe):
    recipe = dataclasses.replace(recipe, iters=100)
    folder = Path(recipe.adapter_path)
    uninterrupted = folder.with_name("whole")
    run = run_lora(dataclasses.replace(recipe, adapter_path=str(uninterrupted)))
    _, errors = run.communicate(timeout=500)
    assert run.returncode == 0, errors
    first = run_lora(recipe)
    while not any(event["step"] >= 3 for event in read_events(folder)):
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=100)
    assert first.returncode == 130
    assert load_state(folder).progress.step < 100
    second = run_lora(recipe, "--resume")
    _, errors = second.communicate(timeout=500)
    assert second.returncode == 0, errors
    assert weights(folder) == weights(uninterrupted)
