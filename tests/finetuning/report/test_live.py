"""report.html during a run: when it is written, and its last version."""

import dataclasses
import json
import os
import signal

import pytest
from commands import call, make_source

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.report import live
from mlx_openelm.finetuning.run import finetune
from mlx_openelm.reporting.run_history import Pace

REFRESH = '<meta http-equiv="refresh" content="15">'


@pytest.fixture(scope="module", autouse=True)
def without_drawings():
    """Overridden: here the reports are complete."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("base"))


@pytest.fixture
def recipe(base, tmp_path):
    records = [{"text": f"the king {'and the wolf ' * (n % 3)}"} for n in range(12)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return FinetuneRecipe(
        data=str(data),
        model=str(base),
        adapter_path=str(tmp_path / "run"),
        rank=2,
        iters=8,
        batch_size=2,
        steps_per_report=1,
        steps_per_eval=2,
        save_every=100,
        sample_prompt=("the <king>",),
        sample_tokens=2,
    )


def record_pages(recipe, act=lambda step: None):
    """Return an observer of a run, and its pages by the step of each report."""
    pages = {}

    def observe(event):
        if event["event"] == "step":
            path = os.path.join(recipe.adapter_path, "report.html")
            with open(path, encoding="utf-8") as page:
                pages[event["step"]] = page.read()
            act(event["step"])

    return observe, pages


def read_page(recipe):
    with open(os.path.join(recipe.adapter_path, "report.html")) as page:
        return page.read()


def test_the_page_is_written_at_the_start_and_at_validations(recipe, monkeypatch):
    monkeypatch.setattr(live, "MAX_SHARE", 1e9)
    observe, pages = record_pages(recipe)
    finetune(recipe, on_event=observe)
    assert "Training has started." in pages[1]
    assert "Training: 0 of 8 steps" in pages[1]
    assert "mlx-openelm generate" not in pages[1]  # no adapter is saved yet
    assert [n for n in pages if pages[n] != pages.get(n - 1)] == [1, 2, 4, 6, 8]
    assert all(REFRESH in page for page in pages.values())
    assert "Validation loss" in pages[4]
    assert 'id="loss"' in pages[4]
    end = read_page(recipe)
    assert REFRESH not in end
    assert "All 8 steps were trained." in end
    assert "mlx-openelm generate --adapter-path" in end


def test_a_short_run_is_not_slowed_by_its_page(recipe):
    observe, pages = record_pages(recipe)
    finetune(recipe, on_event=observe)
    assert len(set(pages.values())) == 1
    assert "All 8 steps were trained." in read_page(recipe)


def test_an_early_stop_ends_the_page(recipe):
    finetune(dataclasses.replace(recipe, learning_rate=1e-9, patience=2))
    page = read_page(recipe)
    assert "Stopped early" in page
    assert REFRESH not in page


def test_an_interrupted_page_shows_how_to_resume_and_refreshes_after_it(recipe):
    def interrupt(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, on_event=record_pages(recipe, interrupt)[0])
    page = read_page(recipe)
    assert "Interrupted at step 3; --resume" in page
    assert REFRESH not in page
    observe, pages = record_pages(recipe)
    finetune(recipe, resume=True, on_event=observe)
    assert REFRESH in pages[4]
    assert "Resumed once." in read_page(recipe)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OpenELMError("The weights are <b>gone</b>."), "The weights are &lt;b&gt;gone"),
        (ValueError("oh"), "ValueError(&#39;oh&#39;)"),
    ],
)
def test_the_page_of_a_failed_run_has_the_error(recipe, error, shown):
    def fail(step):
        if step == 3:
            raise error

    with pytest.raises(type(error)):
        finetune(recipe, on_event=record_pages(recipe, fail)[0])
    page = read_page(recipe)
    assert f"Failed after step 3: {shown}" in page
    assert REFRESH not in page


def test_a_page_that_cannot_be_rendered_is_noted_and_the_run_completes(
    recipe, monkeypatch
):
    def fail(report):
        raise RuntimeError("no ink")

    monkeypatch.setattr(live, "render_training_report", fail)
    events = []
    assert finetune(recipe, on_event=events.append).steps == 8
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert notes == ["The report could not be written: no ink."] * 2


def test_the_page_takes_at_most_its_share_of_the_time():
    now, written = 0.0, 0
    pace = Pace(0.01, 0.5, clock=lambda: now)
    for _ in range(1000):
        now += 1.0
        if pace.allows():
            with pace:
                now, written = now + 2.0, written + 1
    assert 4 <= written <= 5  # the first is expected to take 0.5 s, and takes 2
    assert 2.0 * written <= 0.01 * now + 2.0


def test_the_metrics_go_to_tensorboard_without_torch(recipe, tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    options = [
        *("--model", recipe.model, "--data", recipe.data, "--iters", "4"),
        *("--steps-per-report", "1", "--steps-per-eval", "2"),
        *("--adapter-path", recipe.adapter_path, "--sample-prompt", "the"),
    ]
    result = call("lora", *options, "--report-to", "tensorboard")
    assert result.exit_code == 0, result.stderr
    assert f"report during the run: {recipe.adapter_path}/report.html" in result.stderr
    folder = os.path.join(recipe.adapter_path, "tensorboard")
    read = accumulator.EventAccumulator(folder).Reload()
    assert [s.step for s in read.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [s.step for s in read.Scalars("eval/loss")] == [0, 2, 4]
    assert [t.step for t in read.Tensors("sample/the")] == [0, 2, 4]
    again = call("lora", *options, "--force")  # the event files are part of the run
    assert again.exit_code == 0, again.stderr


def test_a_missing_tracker_is_reported_before_training(recipe, monkeypatch):
    monkeypatch.setattr("mlx_openelm.reporting.trackers.find_spec", lambda name: None)
    with pytest.raises(OpenELMError, match=r"mlx-openelm\[trackio\]"):
        finetune(dataclasses.replace(recipe, report_to=("trackio",)))
    assert not os.path.exists(recipe.adapter_path)
