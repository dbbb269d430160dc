"""Fine-tuning runs: checks, plan, training, interruption and resuming."""

import dataclasses
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from commands import call, expect_error, make_source
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import UNEVEN, weights_of
from ports import free_ports

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning import run_saver
from mlx_openelm.finetuning.objectives import Supervised
from mlx_openelm.finetuning.preparation import prepare
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.run import finetune
from mlx_openelm.finetuning.trainer import Trainer
from mlx_openelm.finetuning.validation import Validation, Validator
from mlx_openelm.recipe_loader import bundled_recipes, load_recipe
from mlx_openelm.storage.loading import load
from mlx_openelm.training import state as training_state
from mlx_openelm.training.events import append_event, read_events
from mlx_openelm.training.state import load_state
from mlx_openelm.training.step import Step

STEPS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("base"))


def write_data(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Write records of a task that a tiny model can learn in part."""
    words = ["king", "gold", "wolf", "wood", "daughter", "eldest", "youngest", "said"]
    numbers = np.random.default_rng(seed)
    with path.open("w") as opened:
        for i in range(count):
            chosen = [words[n] for n in numbers.integers(0, len(words), 2 + i % 5)]
            record = {"prompt": " ".join(chosen), "completion": chosen[-1] + "!"}
            opened.write(json.dumps(record) + "\n")
    return path


def make_recipe(base: Path, folder: Path, **changes) -> FinetuneRecipe:
    data = folder / "train.jsonl"
    if not data.exists():
        write_data(data)
    recipe = FinetuneRecipe(
        data=str(data),
        model=str(base),
        adapter_path=str(folder / "run"),
        rank=4,
        iters=STEPS,
        batch_size=4,
        learning_rate=3e-3,
        dropout=0.1,
        steps_per_report=2,
        steps_per_eval=4,
        save_every=3,
        sample_prompt=("the king",),
        sample_tokens=4,
    )
    return dataclasses.replace(recipe, **changes)


@pytest.fixture
def recipe(base, tmp_path) -> FinetuneRecipe:
    return make_recipe(base, tmp_path)


def weights(folder: Path) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


def mean_loss(model, samples) -> float:
    """Return the nats per target, from the logits of one sample at a time."""
    losses: list[float] = []
    for sample in samples:
        logits = model(mx.array(sample.tokens[:-1])[None])[0]
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        losses += [
            -logits[int(i) - 1, int(sample.tokens[i])].item()
            for i in np.flatnonzero(sample.loss_mask)
        ]
    return float(np.mean(losses))


# A run ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_training_reduces_the_loss_and_the_adapter_is_used(base, tmp_path, method):
    recipe = make_recipe(base, tmp_path, fine_tune_type=method, iters=40)
    report = finetune(recipe)
    assert report.last_loss < report.first_loss - 0.1
    assert report.path == tmp_path / "run"
    model, tokenizer = load(None, report.path)  # the base is the adapter's own
    tokens = mx.array([tokenizer.encode("the king")])
    plain, _ = load(str(base))
    assert mx.abs(model(tokens) - plain(tokens)).max().item() > 1e-3


def test_the_validation_loss_is_that_of_the_saved_adapter(recipe):
    report = finetune(recipe)
    prepared = prepare(recipe)
    model, _ = load(str(recipe.model), report.path)
    assert report.last_loss == pytest.approx(mean_loss(model, prepared.valid), abs=1e-5)


def test_the_command_prints_the_folder_and_writes_all_of_it(base, tmp_path):
    data = write_data(tmp_path / "train.jsonl")
    args = ("lora", "--data", data, "--model", base, "--iters", 4, "--rank", 2)
    out = tmp_path / "adapters" / "train"
    result = call(*args, "--adapter-path", out)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n"), result.stderr
    assert {path.name for path in out.iterdir()} == {
        *("adapter_config.json", "adapters.safetensors", "best", "data.json"),
        *("metrics.jsonl", "recipe.yaml", "report.html", "state.safetensors"),
    }
    result = call("generate", "the king", "--adapter-path", out, "-m", 3)
    assert result.exit_code == 0, result.stderr
    result = call(*args, "--adapter-path", out, "--force", "--json", "--quiet")
    report = json.loads(result.stdout)
    assert result.stderr == ""
    assert report["path"] == str(out)
    assert report["steps"] == 4


def test_the_saved_recipe_reproduces_the_run(recipe, tmp_path):
    first = finetune(recipe)
    again = load_recipe(FinetuneRecipe, str(first.path / "recipe.yaml"), {})
    second = finetune(dataclasses.replace(again, adapter_path=str(tmp_path / "again")))
    assert weights(second.path) == weights(first.path)


def test_every_sample_is_trained_in_every_epoch(base, tmp_path, monkeypatch):
    recipe = make_recipe(base, tmp_path, iters=None, epochs=2.0, batch_size=7)
    seen: list[str] = []
    collate = Supervised.collate

    def note(self, samples):
        seen.extend(sample.place for sample in samples)
        return collate(self, samples)

    monkeypatch.setattr(Supervised, "collate", note)
    monkeypatch.setattr(Validator, "evaluate", lambda self, s: Validation(1.0))
    prepared = prepare(recipe)
    finetune(recipe)
    assert sorted(seen) == sorted(2 * [sample.place for sample in prepared.train])


def worsen_after(monkeypatch, step: int) -> None:
    """Make the validation loss 99 after this step."""
    evaluate = Validator.evaluate

    def worsen(self, samples):
        late = self._run.progress.step > step
        return Validation(99.0) if late else evaluate(self, samples)

    monkeypatch.setattr(Validator, "evaluate", worsen)


def test_patience_ends_a_run_without_improvement(base, tmp_path, monkeypatch):
    worsen_after(monkeypatch, 8)
    recipe = make_recipe(base, tmp_path, patience=2, iters=100, average_last=2)
    report = finetune(recipe)
    assert (report.reason, report.steps, report.best_step) == ("patience", 16, 8)
    # Step 16 is no multiple of `save_every`, but the last step.
    kept = sorted(report.path.glob("0*_adapters.safetensors"))
    assert [path.name[:7] for path in kept] == ["0000015", "0000016"]


def test_the_best_adapter_has_its_own_folder(base, tmp_path, monkeypatch):
    worsen_after(monkeypatch, 8)
    recipe = make_recipe(base, tmp_path)
    report = finetune(recipe)
    assert (report.best_step, report.last_loss) == (8, 99.0)
    prepared = prepare(recipe)
    model, _ = load(None, report.path / "best")
    assert mean_loss(model, prepared.valid) == pytest.approx(report.best_loss, abs=1e-5)


def test_the_mean_of_the_last_saves_is_written_on_request(base, tmp_path):
    recipe = make_recipe(base, tmp_path, average_last=3)
    report = finetune(recipe)
    kept = sorted(report.path.glob("0*_adapters.safetensors"))
    assert [path.name[:7] for path in kept] == ["0000006", "0000009", "0000012"]
    mean = mx.load(str(report.path / "average" / "adapters.safetensors"))
    parts = [mx.load(str(path)) for path in kept]
    for name, array in mean.items():
        expected = np.mean([np.array(part[name], np.float64) for part in parts], axis=0)
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-8)
    load(None, report.path / "average")


def test_the_mean_is_the_same_after_interruptions(base, tmp_path, monkeypatch):
    recipe = make_recipe(base, tmp_path, average_last=3)
    whole = dataclasses.replace(recipe, adapter_path=str(tmp_path / "whole"))
    save_snapshot = run_saver.save_snapshot

    def fail_at_6(run, step, tensors, *, keep):
        if step == 6:
            raise Killed
        save_snapshot(run, step, tensors, keep=keep)

    def stop(event):
        if event["event"] == "step" and event["step"] == 8:
            os.kill(os.getpid(), signal.SIGINT)  # 8 is no multiple of `save_every`

    with monkeypatch.context() as patched:
        patched.setattr(run_saver, "save_snapshot", fail_at_6)
        with pytest.raises(Killed):
            finetune(recipe)
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, resume=True, on_event=stop)
    path = finetune(recipe, resume=True).path
    assert weights(path / "average") == weights(finetune(whole).path / "average")


def test_preference_training_increases_the_margins(base, tmp_path):
    data = tmp_path / "train.jsonl"
    with data.open("w") as opened:
        for i in range(30):
            record = {"prompt": f"the {i} king", "chosen": "gold", "rejected": "wolf"}
            opened.write(json.dumps(record) + "\n")
    recipe = make_recipe(base, tmp_path, objective="dpo", iters=20, dpo_beta=0.5)
    report = finetune(recipe)
    assert report.first_loss == pytest.approx(np.log(2), abs=1e-4)
    assert report.last_loss < 0.5
    evals = [e for e in read_events(report.path) if e["event"] == "eval"]
    assert evals[-1]["accuracy"] == 1


RECORDS = {
    "lora/openelm-peft": {"instruction": "Is gold?", "input": "", "output": "true"},
    "lora/instruct": {"prompt": "Who?", "chosen": "the king", "rejected": "a wolf"},
    "lora/oz": {"text": "the king had three daughters. " * 20},
    "lora/small-mac": {"prompt": "Who?", "completion": "the king"},
    "lora/qlora": {"messages": [{"role": "user", "content": "Who?"}]},
}


@pytest.mark.parametrize(
    "name", [name for name in bundled_recipes() if name.startswith("lora/")]
)
def test_every_bundled_recipe_runs(base, tmp_path, name):
    kind = re.sub("-(270m|450m|1_1b|3b)$", "", name)
    record = RECORDS[kind]
    if "messages" in record:
        answer = {"role": "assistant", "content": "the king"}
        record = {"messages": [*record["messages"], answer]}
    lines = (json.dumps(record | {"id": i}) + "\n" for i in range(12))
    (tmp_path / "train.jsonl").write_text("".join(lines))
    model = base
    if name == "lora/qlora":
        model = tmp_path / "packed"
        result = call("convert", base, "-q", "--q-group-size", 32, "--mlx-path", model)
        assert result.exit_code == 0, result.stderr
    changes = ("--iters", 2, "--max-seq-length", 64, "--rank", 4)
    if kind == "lora/instruct":
        changes = ("--iters", 2, "--max-seq-length", 64, "--max-prompt-length", 32)
        changes = (*changes, "--warmup-steps", 0)
    elif kind == "lora/openelm-peft":
        changes = (*changes, "--warmup-steps", 0)
    result = call(
        *("lora", "-c", name, "--model", model, "--data", tmp_path / "train.jsonl"),
        *("--adapter-path", tmp_path / "run", *changes),
    )
    assert result.exit_code == 0, result.stderr
    resolved = load_recipe(FinetuneRecipe, str(tmp_path / "run" / "recipe.yaml"), {})
    bundled = load_recipe(FinetuneRecipe, name, {})
    assert resolved.learning_rate == bundled.learning_rate
    assert resolved.step_size == bundled.step_size


# Interruptions -------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = make_recipe(base, folder)
    return finetune(recipe).path


@pytest.mark.parametrize("name", ["adam", "sgd", "lion", "adafactor", "muon"])
def test_every_optimizer_resumes_bit_identically(base, tmp_path, name):
    recipe = make_recipe(base, tmp_path, optimizer=name, weight_decay=0.01, iters=6)
    whole = dataclasses.replace(recipe, adapter_path=str(tmp_path / "whole"))
    interrupt_after(recipe, 3)
    resumed = finetune(recipe, resume=True)
    assert weights(resumed.path) == weights(finetune(whole).path)


def test_full_fine_tuning_with_decay_resumes_bit_identically(base, tmp_path):
    changes = {"fine_tune_type": "full", "weight_decay": 0.1, "grad_checkpoint": True}
    recipe = make_recipe(base, tmp_path, iters=6, **changes)
    whole = dataclasses.replace(recipe, adapter_path=str(tmp_path / "whole"))
    interrupt_after(recipe, 3)
    resumed = finetune(recipe, resume=True)
    assert weights(resumed.path) == weights(finetune(whole).path)


class Killed(Exception):
    """Simulates a kill: no code of the package handles it."""


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    signals=st.lists(
        st.tuples(st.integers(0, 28), st.sampled_from(["kill", "int", "term"])),
        min_size=1,
        max_size=4,
    )
)
def test_an_interrupted_run_ends_with_the_same_bytes(
    base, tmp_path_factory, uninterrupted, signals
):
    folder = tmp_path_factory.mktemp("resumed")
    recipe = make_recipe(base, folder)
    path, done = folder / "run", False
    codes: list[object] = []
    for number, how in signals:
        events = 0

        def interrupt(event, number=number, how=how):
            nonlocal events
            events += 1
            if events == number + 1:
                if how == "kill":
                    raise Killed
                os.kill(os.getpid(), signal.SIGINT if how == "int" else signal.SIGTERM)

        old = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            finetune(recipe, resume=path.exists(), on_event=interrupt)
            done = True
            break
        except Killed:
            pass
        except KeyboardInterrupt:
            pass
        except SystemExit as stopped:
            codes.append(stopped.code)
        finally:
            signal.signal(signal.SIGTERM, old)
    if not done:
        finetune(recipe, resume=True)
    assert set(codes) <= {143}
    assert (path / "report.html").exists()
    assert weights(path) == weights(uninterrupted)
    best = path / "best"
    assert weights(best) == weights(uninterrupted / "best")
    shown = [
        [
            (e["step"], e["loss"])
            for e in read_events(run)
            if e["event"] in ("step", "eval")
        ]
        for run in (path, uninterrupted)
    ]
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_signal_saves_and_shows_the_command_to_resume(
    base, tmp_path, uninterrupted, number, code
):
    recipe = make_recipe(base, tmp_path, iters=2000, save_every=100000)
    started = start(recipe, tmp_path)
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 4')
    started.send_signal(number)
    _, stderr = started.communicate(timeout=60)
    assert started.returncode == code, stderr
    step = load_state(tmp_path / "run").progress.step
    assert step >= 4
    assert f"Saved at step {step}." in stderr
    assert "mlx-openelm lora --resume --adapter-path" in stderr
    assert not (tmp_path / "run" / "running.json").exists()


def start(recipe: FinetuneRecipe, folder: Path, *args: str) -> subprocess.Popen:
    path = folder / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "mlx_openelm", "lora", "-c", str(path), *args]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, text: str) -> None:
    until = time.monotonic() + 60
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < until, f"{text} is not in {path}"
        time.sleep(0.02)


@pytest.mark.proof
def test_twenty_kills_do_not_stop_a_run(base, tmp_path):
    numbers = np.random.default_rng(7)
    recipe = make_recipe(base, tmp_path, iters=600, steps_per_report=1, save_every=5)
    recipe = dataclasses.replace(recipe, steps_per_eval=50)
    expected = finetune(dataclasses.replace(recipe, adapter_path=str(tmp_path / "w")))
    run = tmp_path / "run"
    for _ in range(20):
        started = start(recipe, tmp_path, *(("--resume",) if run.exists() else ()))
        # Some are killed while they start, the others after a few steps.
        before, steps = last_step(run), numbers.integers(-4, 20)
        deadline = time.monotonic() + numbers.uniform(0.1, 1.0)
        while (
            time.monotonic() < deadline
            if steps <= 0
            else last_step(run) < before + steps
        ):
            assert started.poll() is None, started.communicate()
            time.sleep(0.002)
        started.kill()
        started.communicate()
        if run.exists():
            assert load_state(run).progress.step >= last_step(run) - 5
    started = start(recipe, tmp_path, "--resume")
    _, stderr = started.communicate(timeout=300)
    assert started.returncode == 0, stderr
    assert weights(run) == weights(expected.path)


def last_step(folder: Path) -> int:
    return max((e["step"] for e in read_events(folder)), default=0)


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"dropout": 0.0}, "--batch-size 2 --grad-accumulation-steps 2"),
        ({"dropout": 0.1}, "--grad-checkpoint"),
        ({"batch_size": 1, "grad_checkpoint": True}, "--max-seq-length 32"),
    ],
)
def test_the_command_after_a_kill_works(base, tmp_path, changes, flags):
    recipe = make_recipe(base, tmp_path, **changes)
    interrupt_after(recipe, 6)
    path = Path(recipe.adapter_path)
    (path / "running.json").write_text("{}")  # as a killed process leaves it
    with pytest.raises(OpenELMError, match="killed after step 6 was saved") as raised:
        finetune(recipe)
    command = str(raised.value).partition(": mlx-openelm ")[2]
    assert flags in command
    result = call(*shlex.split(command), "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == STEPS


def test_a_resumed_run_notes_the_kill(recipe):
    interrupt_after(recipe, 6)
    (Path(recipe.adapter_path) / "running.json").write_text("{}")
    events = []
    finetune(recipe, resume=True, on_event=events.append)
    [note] = [event["text"] for event in events if event["event"] == "note"]
    assert "killed after step 6 was saved" in note


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-4}, "`learning_rate` was 0.003 and is now 0.0001"),
        ({"seed": 5}, "`seed` was 0 and is now 5"),
        ({"batch_size": 8}, "`batch_size` times `grad_accumulation_steps` was 4"),
        ({"rank": 8}, "`rank` was 4 and is now 8"),
    ],
)
def test_a_run_is_not_resumed_with_other_options(recipe, changes, message):
    interrupt_after(recipe, 3)
    before = weights(Path(recipe.adapter_path))
    with pytest.raises(OpenELMError, match=message):
        finetune(dataclasses.replace(recipe, **changes), resume=True)
    assert weights(Path(recipe.adapter_path)) == before


@pytest.mark.parametrize("name", ["dropout", "neftune_noise"])
def test_a_random_run_is_not_resumed_with_smaller_batches(recipe, name):
    recipe = dataclasses.replace(recipe, **{"dropout": 0.0, name: 0.5})
    interrupt_after(recipe, 3)
    smaller = dataclasses.replace(recipe, batch_size=2, grad_accumulation_steps=2)
    with pytest.raises(OpenELMError, match="changes the dropout masks or noise"):
        finetune(smaller, resume=True)


def test_a_run_is_not_resumed_with_other_data(recipe):
    interrupt_after(recipe, 3)
    write_data(Path(recipe.data), seed=1)
    with pytest.raises(OpenELMError, match="the data has changed"):
        finetune(recipe, resume=True)


def test_a_run_is_not_resumed_with_another_base(recipe, tmp_path):
    interrupt_after(recipe, 3)
    other = make_source(tmp_path / "other", weights_of(UNEVEN, seed=1))
    with pytest.raises(OpenELMError, match="another base"):
        finetune(dataclasses.replace(recipe, model=str(other)), resume=True)


def interrupt_after(recipe: FinetuneRecipe, step: int) -> None:
    def interrupt(event):
        if event["event"] == "save" and event["step"] == step:
            raise Killed

    with pytest.raises(Killed):
        finetune(recipe, on_event=interrupt)


def test_a_full_disk_does_not_stop_the_run(recipe, uninterrupted, monkeypatch):
    save, refused = training_state.save_tensors, []

    def sometimes_full(path, tensors, **options):
        if (
            "state" in path.name
            and not refused
            and len(list(path.parent.iterdir())) > 4
        ):
            refused.append(path)
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, tensors, **options)

    events = []

    def record(event):
        events.append(event)
        if event["event"] == "note":
            load_state(Path(recipe.adapter_path))  # the old state is intact

    monkeypatch.setattr(training_state, "save_tensors", sometimes_full)
    finetune(recipe, on_event=record)
    assert refused
    [note] = [event["text"] for event in events if event["event"] == "note"]
    assert "could not be saved" in note
    assert weights(Path(recipe.adapter_path)) == weights(uninterrupted)


def test_only_one_process_trains_a_folder(recipe):
    path = Path(recipe.adapter_path)
    refusals = []

    def start_another(event):
        if event["event"] == "save" and event["step"] == 3:
            for options in ({"force": True}, {"resume": True}):
                with pytest.raises(OpenELMError, match="in use by another process"):
                    finetune(recipe, **options)
                refusals.append(options)

    finetune(recipe, on_event=start_another)
    assert len(refusals) == 2
    assert not (path / "running.json").exists()


# Non-finite values ---------------------------------------------------------------


def make_nan(monkeypatch, *, steps: set[int]) -> None:
    """Make the loss of these steps NaN."""
    compute_gradient, update, current = Step._compute_gradient, Trainer.update, [0]

    def record_step(self, stop):
        current[0] = self._run.progress.step
        return update(self, stop)

    def with_nan(self, part):
        totals, gradients = compute_gradient(self, part)
        if current[0] in steps:
            totals.loss = float("nan")
        return totals, gradients

    monkeypatch.setattr(Trainer, "update", record_step)
    monkeypatch.setattr(Step, "_compute_gradient", with_nan)


def test_a_non_finite_batch_is_skipped_and_reported(recipe, monkeypatch):
    make_nan(monkeypatch, steps={2, 5, 6})
    events = []
    report = finetune(recipe, on_event=events.append)
    assert report.skipped == 3
    skips = [event for event in events if event["event"] == "skip"]
    order = prepare(recipe).order
    for skip, step in zip(skips, (2, 5, 6), strict=True):
        assert skip["step"] == step + 1
        assert len(skip["samples"]) == len(order.batch(step))
        assert all(place.startswith("train.jsonl:") for place in skip["samples"])
    arrays = mx.load(str(report.path / "adapters.safetensors"))
    assert all(mx.isfinite(array).all().item() for array in arrays.values())


def test_three_skipped_batches_in_a_row_stop_the_run(recipe, monkeypatch):
    make_nan(monkeypatch, steps={7, 8, 9})
    with pytest.raises(OpenELMError, match=r"3 batches in a row, .*state of step 9"):
        finetune(recipe)
    assert load_state(Path(recipe.adapter_path)).progress.step == 9


def test_nan_is_never_saved(recipe, monkeypatch):
    update = Trainer.update

    def with_nan(self, stop):
        result = update(self, stop)
        if self._run.progress.step == 5:
            self._run.model.update(
                {
                    "transformer": {
                        "layers": [
                            {"ffn": {"proj_1": {"lora_b": mx.full((4, 192), mx.nan)}}}
                        ]
                    }
                }
            )
        return result

    monkeypatch.setattr(Trainer, "update", with_nan)
    with pytest.raises(OpenELMError):
        finetune(recipe)
    path = Path(recipe.adapter_path)
    for file in path.rglob("*.safetensors"):
        for name, array in mx.load(str(file)).items():
            assert mx.isfinite(array.astype(mx.float32)).all().item(), (file, name)


def test_a_run_that_changes_no_weight_fails(base, tmp_path):
    recipe = make_recipe(base, tmp_path, learning_rate=0.0, final_learning_rate=0.0)
    with pytest.raises(OpenELMError, match="changed no weight"):
        finetune(recipe)


# A plan before the start ---------------------------------------------------------


def test_a_dry_run_plans_and_writes_nothing(base, tmp_path):
    data = write_data(tmp_path / "train.jsonl")
    out = tmp_path / "run"
    args = ("lora", "--data", data, "--model", base, "--adapter-path", out, "--dry-run")
    result = call(*args)
    assert (result.exit_code, result.stdout) == (0, "")
    for words in ("36 records", "trained parameters", "memory: about", "epochs"):
        assert words in result.stderr, result.stderr
    plan = json.loads(call(*args, "--json").stdout)
    assert plan["plan"]["trainable"] > 0
    assert plan["data"]["train"]["records"] == 36
    assert not out.exists()


def test_a_run_that_does_not_fit_is_refused_and_fit_chooses_smaller_settings(
    base, tmp_path
):
    recipe = make_recipe(base, tmp_path, batch_size=16)
    whole = prepare(recipe).plan.memory.total
    smaller = dict(prepare(recipe).plan.smaller)
    least = min(smaller.values())
    assert least < whole
    limited = dataclasses.replace(recipe, memory_limit=(whole + least) / 2 / 1e9)
    with pytest.raises(OpenELMError, match="or `fit` to choose this automatically"):
        finetune(limited)
    assert not Path(recipe.adapter_path).exists()
    report = finetune(limited, fit=True)
    chosen = load_recipe(FinetuneRecipe, str(report.path / "recipe.yaml"), {})
    assert chosen.step_size == recipe.step_size
    assert chosen.grad_checkpoint or chosen.batch_size < 16


def test_out_of_memory_shows_a_command_that_needs_less(base, tmp_path, monkeypatch):
    recipe = make_recipe(base, tmp_path, dropout=0.0)

    def run_out(self, part):
        raise RuntimeError("[metal::malloc] Attempting to allocate 1 bytes")

    monkeypatch.setattr(Step, "_compute_gradient", run_out)
    with pytest.raises(OpenELMError, match=r"--resume .* --batch-size 2 --grad-acc"):
        finetune(recipe)


# Bad input -----------------------------------------------------------------------


def write_bytes(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    return path


GOOD = b'{"prompt": "the king", "completion": "gold"}\n'


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        (b"", (), "has no records"),
        (GOOD * 999 + b'{"prompt": 1}\n' + GOOD, (), "train.jsonl:1000"),
        (GOOD + b'{"text": "x"}\n', (), "train.jsonl:2 is text"),
        (GOOD + b'{"prompt": "x", "completion": " "}\n', (), "train.jsonl:2"),
        (GOOD + b'{"prompt": "x",\n', (), "train.jsonl:2:"),
        (GOOD, ("--keys", "attn.nothing"), "choose from attn.out_proj, attn.qkv_proj"),
        (GOOD, ("--rank", 1000), "--rank of 1 to"),
        (GOOD, ("--rank", "auto"), "--rank is 'auto'"),
        (GOOD, ("--num-layers", 9), "the model has 3 layers"),
        (GOOD, ("--max-seq-length", 100), "the model's context of 64"),
        (GOOD, ("--epochs", 1, "--iters", 3), "not both"),
        (GOOD, ("--optimizer", "adamx"), "choose adamw"),
        (GOOD, ("--template", "chat"), "chat"),
        (GOOD, ("--test",), "needs a test file"),
        (
            b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
            ("--objective", "dpo", "--max-prompt-length", 64),
            "--max-prompt-length is 64",
        ),
        (GOOD, ("--resume",), "no run to resume"),
        (GOOD, ("--learning-rate", "nan"), "--learning-rate is nan"),
        (GOOD, ("--model", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_reported_before_the_start(base, tmp_path, content, args, message):
    write_bytes(tmp_path, content)
    model = () if "--model" in args else ("--model", base)
    out = ("--adapter-path", tmp_path / "run", "--offline")
    data = ("--data", tmp_path / "train.jsonl")
    expect_error(tmp_path, "lora", *data, *model, *out, *args, message=message)


def test_missing_data_is_reported_with_the_path(base, tmp_path):
    out = ("--adapter-path", tmp_path / "run")
    expect_error(
        tmp_path,
        "lora",
        "--data",
        tmp_path / "no.jsonl",
        "--model",
        base,
        *out,
        message="no.jsonl",
    )
    (tmp_path / "d").mkdir()
    expect_error(
        tmp_path,
        "lora",
        "--data",
        tmp_path / "d",
        "--model",
        base,
        *out,
        message="train.jsonl",
    )


def test_a_folder_with_a_run_is_not_replaced(base, tmp_path, recipe):
    finetune(recipe)
    expect_error(
        tmp_path,
        *("lora", "--data", recipe.data, "--model", base),
        *("--adapter-path", recipe.adapter_path),
        message=["complete run", "--force"],
    )
    expect_error(
        tmp_path,
        "lora",
        "--adapter-path",
        recipe.adapter_path,
        "--resume",
        message="is complete",
    )


def test_force_does_not_replace_other_files(base, tmp_path, recipe):
    Path(recipe.adapter_path).mkdir()
    (Path(recipe.adapter_path) / "thesis.txt").write_text("all of it")
    with pytest.raises(OpenELMError, match="`force` does not replace it"):
        finetune(recipe, force=True)
    assert (Path(recipe.adapter_path) / "thesis.txt").exists()


def test_force_keeps_the_old_run_until_the_new_one_starts(recipe):
    path = finetune(recipe).path
    before = weights(path)
    with pytest.raises(OpenELMError, match="`rank`"):
        finetune(dataclasses.replace(recipe, rank=1000), force=True)
    assert weights(path) == before
    report = finetune(dataclasses.replace(recipe, seed=3), force=True)
    assert weights(report.path) != before


def test_an_unknown_key_of_a_recipe_is_reported(tmp_path):
    (tmp_path / "r.yaml").write_text("data: x\nlerning_rate: 1\n")
    expect_error(
        tmp_path,
        "lora",
        "-c",
        tmp_path / "r.yaml",
        message="did you mean learning_rate?",
    )


def test_a_single_record_is_enough(base, tmp_path):
    write_bytes(tmp_path, GOOD)
    report = finetune(make_recipe(base, tmp_path, batch_size=8, iters=3))
    assert report.first_loss is None
    assert report.steps == 3


def test_a_damaged_state_is_reported(recipe):
    interrupt_after(recipe, 6)
    state = Path(recipe.adapter_path) / "state.safetensors"
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(OpenELMError, match="damaged"):
        finetune(recipe, resume=True)


def test_training_works_outside_the_main_thread(recipe):
    reports = []
    thread = threading.Thread(target=lambda: reports.append(finetune(recipe)))
    thread.start()
    thread.join(60)
    assert reports[0].steps == STEPS


@pytest.mark.parametrize("data", ["model", "run", "inside"])
def test_force_does_not_replace_the_base_or_the_data(tmp_path, data):
    model = make_source(tmp_path / "model")
    write_data(tmp_path / "train.jsonl")
    run = tmp_path / "run"
    args = ["--model", model, "--iters", 2, "--adapter-path", run]
    assert call("lora", "--data", tmp_path / "train.jsonl", *args).exit_code == 0
    if data == "model":
        args, message = ["--model", model, "--adapter-path", model], "the source itself"
        args += ["--data", tmp_path / "train.jsonl"]
    else:
        write_data(run / "train.jsonl")
        chosen = run if data == "run" else run / "train.jsonl"
        args, message = [*args, "--data", chosen], "--force does not replace it"
    expect_error(tmp_path, "lora", *args, "--force", message=message)


def test_preferences_are_tested_at_the_end(base, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "test"):
        records = (
            {"prompt": f"the {i}", "chosen": "gold", "rejected": "wolf"}
            for i in range(8)
        )
        lines = (json.dumps(record) + "\n" for record in records)
        (data / f"{name}.jsonl").write_text("".join(lines))
    recipe = make_recipe(
        base, tmp_path, data=str(data), objective="dpo", test=True, iters=2
    )
    report = finetune(recipe)
    assert report.unit == "pair"
    assert 0 < report.test_loss < 1


def test_preferences_report_the_same_after_an_interruption(base, tmp_path):
    data = tmp_path / "train.jsonl"
    records = (
        {"prompt": f"the {i}", "chosen": "gold", "rejected": "wolf"} for i in range(30)
    )
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = make_recipe(base, tmp_path, objective="dpo", steps_per_report=4)
    whole = dataclasses.replace(recipe, adapter_path=str(tmp_path / "whole"))
    interrupt_after(recipe, 6)
    shown = [
        [
            {k: e[k] for k in ("step", "loss", "accuracy", "margin", "tokens")}
            for e in read_events(run.path)
            if e["event"] == "step"
        ]
        for run in (finetune(recipe, resume=True), finetune(whole))
    ]
    assert shown[0] == shown[1]


def test_odd_samples_and_damaged_lines_are_read(tmp_path):
    append_event(tmp_path, {"event": "sample", "step": 1, "text": "a\u2028b\u0085c"})
    with (tmp_path / "metrics.jsonl").open("a") as opened:
        opened.write('{"step": 3}\n{"event": 5, "step": 3}\n[1]\n{"ev')
    assert [e["text"] for e in read_events(tmp_path)] == ["a\u2028b\u0085c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": float("nan"), "iters": None}, "`epochs` is nan"),
        ({"epochs": 1e9, "iters": None}, "`epochs` is 1000000000.0"),
        ({"betas": (1.0, 1.0)}, "`betas` are 1.0 and 1.0"),
        ({"eps": 0.0}, "`eps` is 0.0"),
        ({"rank": "auto:" + "9" * 5000}, "`rank` is"),
        ({"batch_size": 2**30}, "`batch_size` is 1073741824"),
        ({"data": ""}, "`data` is empty"),
    ],
)
def test_invalid_options_are_reported(base, tmp_path, changes, message):
    with pytest.raises(OpenELMError, match=message):
        make_recipe(base, tmp_path, **changes)


# More than one process -----------------------------------------------------------


def test_two_processes_train_the_same_weights_as_one(base, tmp_path):
    alone = make_recipe(base, tmp_path, dropout=0.0, batch_size=5)
    together = dataclasses.replace(alone, adapter_path=str(tmp_path / "together"))
    expected = finetune(alone)
    (tmp_path / "recipe.yaml").write_text(together.to_yaml())
    result = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("mlx.launch")), "-n", "2"),
            *("--backend", "ring", "--starting-port", str(free_ports(1)[0])),
            *(sys.executable, "-m", "mlx_openelm", "lora"),
            *("-c", str(tmp_path / "recipe.yaml"), "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stdout.splitlines() if line.startswith("{")]
    report = json.loads(line)
    assert report["tokens"] == expected.tokens
    assert report["last_loss"] == pytest.approx(expected.last_loss, abs=1e-5)
    ours = mx.load(str(Path(together.adapter_path) / "adapters.safetensors"))
    for name, array in mx.load(str(expected.path / "adapters.safetensors")).items():
        assert mx.abs(ours[name] - array).max().item() <= 1e-5, name
