"""report.html of a pre-training run, and the log of another run in it."""

import html
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from commands import call
from pretrainings import read_metrics, small_recipe

torch = pytest.importorskip("torch", reason="needs PyTorch")

from converters.pretraining.checkpoints import as_json  # noqa: E402
from converters.pretraining.compared_logs import read_compared_losses  # noqa: E402
from converters.pretraining.log import Saved, Spiked, Trained  # noqa: E402
from converters.pretraining.report import RunReport  # noqa: E402
from converters.pretraining.run import pretrain  # noqa: E402
from mlx_openelm.errors import OpenELMError  # noqa: E402

REFRESH = '<meta http-equiv="refresh" content="60">'
LOGS = "2024-04-01 10:00:00 - \x1b[34m\x1b[1mLOGS   \x1b[0m - "
EPOCH = f"{LOGS}Epoch:   0 [{{:8d}}/  350000], "
REST = ", LR: [1e-06, 1e-06], Avg. batch load time: 34.452, Elapsed time: 50.69"
THEIRS = "\n".join(
    (
        f"{LOGS}Directory exists at: results/run_1",
        f"{LOGS}Training epoch 0",
        f"{EPOCH.format(2)}loss: 5.5000{REST}",
        f"{EPOCH.format(4)}loss: {{'total_loss': 5.25, 'z_loss': 0.01}}{REST}",
        f"{EPOCH.format(8)}loss: 9.0{REST}",
        f"{LOGS}*** Validation summary for epoch 0 [ 6/ 10] loss: 7.7",
        f"{EPOCH.format(8)}loss: 4.125{REST}",
        f"{EPOCH.format(5000)}loss: 3.0{REST}",
    )
)


@pytest.fixture(scope="module", autouse=True)
def without_drawings():
    """Overridden: here the reports are complete."""


@pytest.fixture
def recipe(tmp_path):
    recipe = small_recipe(tmp_path)
    return replace(recipe, sample_every=6, sample_prompts=("Once <b>upon</b>",))


def page_of(recipe) -> str:
    return (Path(recipe.output) / "report.html").read_text(encoding="utf-8")


def pages_during(recipe) -> list[str]:
    """Train, and return the page at each checkpoint."""
    pages = []

    def read(event):
        if isinstance(event, Saved):
            pages.append(page_of(recipe))

    pretrain(recipe, on_event=read)
    return pages


def facts_of(page: str) -> dict[str, str]:
    pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)
    return {html.unescape(name): html.unescape(value) for name, value in pairs}


def test_the_report_exists_during_training_and_is_complete_at_the_end(recipe):
    pages = pages_during(recipe)
    assert all(REFRESH in page for page in pages)
    assert "Training: 0 of 12 steps" in pages[0]
    page = page_of(recipe)
    assert REFRESH not in page
    assert "12 of 12 steps were trained." in page
    trained = read_metrics(recipe.output)
    scores = read_metrics(recipe.output, "evaluated")
    facts = facts_of(page)
    assert facts["trained tokens"] == f"{trained[-1]['tokens']:,}"
    assert float(facts["tokens per second"].replace(",", "")) > 0
    assert facts["loss spikes"] == "0"
    assert facts["held-out bits per byte"] == f"{scores[-2]['bits_per_byte']:.4f}"
    for row in trained:
        assert f"<td>{row['loss']:.4f}</td>" in page
    assert f"held-out: {scores[0]['nats_per_token']:.5g} at step 6" in page
    for title in ("Tokens per second", "Learning rate", "Gradient norm", "z-loss"):
        assert f">{title}" in page
    assert "Share of the devices" not in page  # a CPU's peak is not known
    assert "<b>Once &lt;b&gt;upon" in page
    assert "After 6 steps" in page
    assert "After 12 steps" in page
    assert f"mlx-openelm convert {recipe.output}/checkpoint_average.pt" in page
    assert "<code>recipe.json</code>" in page


def test_the_page_is_rewritten_while_there_is_time(recipe, monkeypatch):
    monkeypatch.setattr("converters.pretraining.report.EXPECTED_SECONDS", 0.0)
    monkeypatch.setattr("converters.pretraining.report.MAX_SHARE", 100.0)
    pages = pages_during(replace(recipe, report_every=4))
    assert re.search(r"Training: 4 of 12 steps at \d\d:\d\d:\d\d\. This page", pages[0])
    assert REFRESH in pages[0]


def test_spikes_resumes_and_utilisation_are_shown(recipe):
    """From a metrics.jsonl as a run on GPUs writes it."""
    folder = Path(recipe.output)
    folder.mkdir()
    rows = [
        {"event": "started", "first_step": 0, "processes": 128, "num_tokens": 5000},
        *(trained(step, 4.0 - step / 100) for step in range(10, 100, 10)),
        {"event": "spiked", "step": 37, "loss": 9.0, "median": 3.7},
        {"event": "started", "first_step": 50, "processes": 64},
        {"event": "saved", "step": 90, "dropped": {"too few tokens": 1200}},
        {"event": "noted", "text": "Resumed <x> after 5 iterations."},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    failures = []
    config = recipe.model.build(300)
    with (
        pytest.raises(OpenELMError),
        RunReport(recipe, config, failures.append),
    ):
        raise OpenELMError("Too <hot>.")
    assert not failures
    page = page_of(recipe)
    assert "Failed after 90 of 12 steps: Too &lt;hot&gt;." in page
    assert "Resumed at step 50." in page
    assert "Loss spikes at step 37." in page
    assert "loss spike: at step 37." in page  # of the chart
    assert "resumed: at step 50." in page
    assert "Share of the devices" in page
    facts = facts_of(page)
    assert facts["share of peak FLOP/s"] == "41 %"
    assert facts["processes"] == "64"
    assert facts["loss spikes"] == "1"
    assert facts["dropped: too few tokens"] == "1,200"
    assert "Resumed &lt;x&gt; after 5 iterations." in page


def trained(step: int, loss: float) -> dict:
    numbers = {"z_loss": 0.01, "learning_rate": 1e-3, "gradient_norm": 1.0, "mfu": 0.41}
    return {
        **{"event": "trained", "step": step, "loss": loss, "tokens": step * 100},
        **{"tokens_per_second": 1234.5, "seconds_left": 7200.0, **numbers},
    }


@pytest.mark.parametrize("event", [Trained, Spiked])
def test_a_page_that_cannot_be_written_does_not_stop_the_run(
    recipe, monkeypatch, event
):
    def fail(report):
        raise ValueError("no ink")

    monkeypatch.setattr("converters.pretraining.report.render_training_report", fail)
    notes = []
    recipe = replace(recipe, steps=2)
    pretrain(recipe, on_event=lambda e: notes.append(getattr(e, "text", "")))
    assert notes.count("The report could not be written: no ink.") == 2


def test_an_interrupted_run_says_how_to_continue(recipe):
    def stop(event):
        if isinstance(event, Trained) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, on_event=stop)
    assert "Interrupted after 3 of 12 steps; --resume continues" in page_of(recipe)


# Another run's log ---------------------------------------------------------------


def test_the_log_of_corenet_is_drawn_beside_the_run(recipe, tmp_path):
    log = tmp_path / "training_logs.txt"
    log.write_text(THEIRS)
    assert read_compared_losses(log) == [(2, 5.5), (4, 5.25), (8, 4.125), (5000, 3.0)]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(as_json(recipe)))
    command = ("pretrain", "-c", str(path), "--quiet", "--compare-log", str(log))
    assert call(*command).exit_code == 0
    page = page_of(recipe)
    ours = next(r["loss"] for r in read_metrics(recipe.output) if r["step"] == 8)
    assert facts_of(page)["loss in training_logs.txt"] == (
        f"4.125 at step 8; here {ours:.3f} at 8"
    )
    described = "training_logs.txt: 5.5 at step 2, 4.125 at step 8, between 4.125"
    assert described in html.unescape(page)
    assert "<td>5.2500</td>" in page
    other = tmp_path / "other.jsonl"  # a metrics.jsonl, for a run that is complete
    other.write_text((Path(recipe.output) / "metrics.jsonl").read_text() + '{"tru')
    command = (*command[:-1], str(other), "--resume")
    assert call(*command).exit_code == 0
    assert "other.jsonl: " in html.unescape(page_of(recipe))
    assert len(read_compared_losses(other)) == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Cannot read the log"),
        (b"Training started\nloss: 3\n", "No line of .* has an iteration"),
        (b"\xff\xfe\x00", "Cannot read the log|No line of"),
    ],
)
def test_a_log_without_losses_is_refused_before_training(
    recipe, tmp_path, content, message
):
    log = tmp_path / "log.txt"
    if content is not None:
        log.write_bytes(content)
    with pytest.raises(OpenELMError, match=message):
        pretrain(replace(recipe, compare_log=str(log)))
    assert not (Path(recipe.output) / "metrics.jsonl").exists()
