"""The log of a run: means, spikes, samples, TensorBoard, and the terminal."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from models import UNEVEN, as_torch, small_tokenizer, weights_of
from pretrainings import (
    read_losses,
    read_metrics,
    small_recipe,
)

torch = pytest.importorskip("torch", reason="needs PyTorch")

from converters.pretraining.heldout import continue_greedily  # noqa: E402
from converters.pretraining.log import (  # noqa: E402
    Evaluated,
    Meter,
    RunLog,
    Sampled,
    Saved,
    Spiked,
    Started,
    Trained,
)
from converters.pretraining.run import pretrain  # noqa: E402
from converters.reference import ReferenceOpenELM  # noqa: E402
from mlx_openelm.cli.console import Console  # noqa: E402
from mlx_openelm.cli.views.pretraining import PretrainingView  # noqa: E402
from mlx_openelm.errors import OpenELMError  # noqa: E402


@pytest.fixture
def recipe(tmp_path):
    return small_recipe(tmp_path)


def add(meter: Meter, step: int, loss: float) -> Spiked | None:
    return meter.add(step, loss=loss, z_loss=0.5, norm=2.0, tokens=10, positions=16)


def test_a_loss_far_above_the_previous_ones_is_a_spike():
    meter = Meter(1e6, None)
    steady = [3.0 + 0.01 * (step % 5) for step in range(60)]
    assert not any(add(meter, i, loss) for i, loss in enumerate(steady))
    assert add(meter, 60, 3.06) is None  # 4 deviations
    assert add(meter, 61, 3.2) == Spiked(61, 3.2, pytest.approx(3.02))
    assert add(meter, 62, 2.0) is None  # a decrease is not a spike
    early = Meter(1e6, None)
    assert not any(add(early, i, 10.0**i) for i in range(20))


def test_a_report_has_the_means_and_the_utilisation(monkeypatch):
    clock = iter([0.0, 8.0, 9.0, 9.0, 9.0])
    monkeypatch.setattr(
        "converters.pretraining.log.time.perf_counter", lambda: next(clock)
    )
    meter = Meter(flops_per_position=1000.0, peak_flops=10_000.0)
    add(meter, 1, 4.0)
    add(meter, 2, 2.0)
    event = meter.report(2, 10, 0.1)
    assert (event.loss, event.z_loss, event.gradient_norm) == (3.0, 0.5, 2.0)
    assert (event.tokens, event.tokens_per_second) == (20, 2.5)
    assert event.mfu == pytest.approx(32 * 1000 / 8 / 10_000)
    assert event.seconds_left == pytest.approx(8 / 2 * 8)
    other = Meter(1000.0, None)
    other.restore(json.loads(json.dumps(meter.state())))
    assert other.tokens == 20


def test_records_after_the_checkpoint_of_a_killed_run_are_removed(tmp_path):
    lines = [
        {"event": "started", "first_step": 0},
        *({"event": "trained", "step": step} for step in range(1, 6)),
        {"event": "evaluated", "step": 3, "averaged": True},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n7\n{"event": "tra')
    RunLog(tmp_path, lambda event: None, step=3)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == lines[:4]


def test_z_loss_is_separate_and_samples_follow_the_schedule(recipe):
    recipe = replace(recipe, sample_every=6, sample_prompts=("Once upon", "The wolf"))
    pretrain(recipe)
    trained = read_metrics(recipe.output)
    assert all(0 < r["z_loss"] < 1e-4 * 100 for r in trained)
    assert all("mfu" not in r for r in trained)  # a CPU's peak is not known
    assert [r["tokens"] for r in trained] == [128 * i for i in range(1, 13)]
    samples = read_metrics(recipe.output, "sampled")
    assert [(r["step"], r["prompt"]) for r in samples] == [
        (step, prompt) for step in (6, 12) for prompt in ("Once upon", "The wolf")
    ]
    assert all(r["text"] for r in samples)
    evaluated = read_metrics(recipe.output, "evaluated")
    assert [(r["step"], r["averaged"]) for r in evaluated] == [
        (6, False),
        (12, False),
        (12, True),
    ]


def test_a_sample_equals_decoding_without_a_cache():
    model = ReferenceOpenELM(UNEVEN)
    model.load_state_dict(as_torch(weights_of(UNEVEN)))
    tokenizer = small_tokenizer()
    ids = tokenizer.encode("Once upon")
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert len(set(ids[-12:])) > 3
    text = continue_greedily(model, tokenizer, "Once upon", 12)
    assert "Once upon" + text == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "key", [{"tensorboard": True}, {"report_to": ("tensorboard",)}]
)
def test_tensorboard_reads_the_curve(recipe, key):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    recipe = replace(recipe, **key)
    pretrain(recipe)
    read = event_accumulator.EventAccumulator(
        str(Path(recipe.output) / "tensorboard")
    ).Reload()
    logged = [scalar.value for scalar in read.Scalars("trained/loss")]
    assert logged == pytest.approx(read_losses(recipe.output), rel=1e-6)


def test_missing_tensorboard_is_reported_before_training(recipe, monkeypatch):
    monkeypatch.setattr("mlx_openelm.reporting.trackers.find_spec", lambda name: None)
    with pytest.raises(OpenELMError, match="not installed"):
        pretrain(replace(recipe, tensorboard=True))


def test_a_loss_that_is_not_finite_ends_the_run_but_not_its_checkpoint(recipe):
    hot = replace(recipe.optimizer, learning_rate=1e30, warmup_steps=5, clip_norm=1e9)
    with pytest.raises(OpenELMError, match="last checkpoint is unaffected"):
        pretrain(replace(recipe, optimizer=hot, save_every=1))
    last = Path(recipe.output) / "training_checkpoint_last.pt"
    state = torch.load(last, weights_only=True)
    assert all(t.isfinite().all() for t in state["model_state_dict"].values())


def test_the_terminal_shows_each_event(capsys):
    with PretrainingView(Console()) as view:
        view(Started(10_000, 3, None, 500, {}, 20, 0, 2))
        view(Trained(10, 3.0, 0.1, 1e-3, 1.0, 99, 1234.0, 0.41, 90_061))
        view(Spiked(11, 9.0, 3.0))
        view(Evaluated(12, 2.5, 1.25))
        view(Sampled(12, "Once", " upon\na \x1b[31mtime"))
        view(Saved(20, Path("run/last.pt"), {"too few tokens": 1200}))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "10,000 parameters; 3 documents, 500 tokens; 2 processes; step 0 of 20",
        "step 11: loss spike: 9.0000, median 3.0000",
        "step 12: held-out 2.5000 nats per token, 1.2500 bits per byte",
        "step 12: Once upon a \\x1b[31mtime",
        "step 20: saved run/last.pt (text dropped: too few tokens: 1,200)",
    ]


def test_held_out_scores_are_those_of_evaluate(recipe, tmp_path):
    """`evaluate` scores all of the text in MLX, the run a sample of its windows."""
    from converters.conversion.run import convert
    from mlx_openelm.evaluation.texts import evaluate
    from mlx_openelm.storage.loading import load

    recipe = replace(recipe, eval_every=12, average_last=3)
    path = pretrain(recipe)
    report = convert([str(path)], tmp_path / "mlx", dtype="float32", receipt=False)
    model, tokenizer = load(str(report.path))
    score = evaluate(
        model, tokenizer, text=recipe.data.heldout[0], window=recipe.eval_window
    )
    last, mean = read_metrics(recipe.output, "evaluated")
    assert mean["averaged"]  # worse, as this model still improves quickly
    assert mean["nats_per_token"] > last["nats_per_token"] * 1.05
    assert mean["nats_per_token"] == pytest.approx(score.nats_per_token, rel=0.03)
    assert mean["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=0.03)
