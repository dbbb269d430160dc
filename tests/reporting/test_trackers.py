"""Metrics in experiment trackers; wandb and trackio are replaced by a fake."""

import math
import sys
import types

import pytest

from mlx_openelm.errors import OpenELMError
from mlx_openelm.reporting.trackers import Trackers, require_trackers


def open_trackers(folder, *names, first_step=0, failures=None):
    return Trackers(
        names,
        folder,
        config={"rank": 16},
        first_step=first_step,
        on_failure=(failures if failures is not None else []).append,
    )


class HostedModule(types.ModuleType):
    """wandb or trackio, as far as they are used."""

    def __init__(self, name):
        super().__init__(name)
        self.calls, self.broken = [], False

    def init(self, **options):
        print("tracking starts")
        if self.broken:
            raise RuntimeError("no key")
        self.calls.append(("init", options["project"], options["name"]))
        return self

    def Table(self, columns, data):
        return [columns, *data]

    def log(self, numbers, step):
        if self.broken:
            raise RuntimeError("no network")
        self.calls.append((step, numbers))

    def finish(self):
        self.calls.append("finish")


@pytest.fixture
def hosted(monkeypatch):
    modules = {}
    for name in ("wandb", "trackio"):
        modules[name] = HostedModule(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
    monkeypatch.setattr("mlx_openelm.reporting.trackers.find_spec", lambda name: name)
    for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    return modules


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_hosted_run_gets_finite_numbers_and_texts(name, hosted, tmp_path, capsys):
    trackers = open_trackers(tmp_path, name)
    record = {"step": 7, "steps": 9, "loss": 2, "norm": math.nan, "best": True}
    trackers.log("train", {**record, "event": "step"})
    trackers.log("train", {"loss": 1.0})  # of no step
    trackers.log_text(7, "sample", "Once")
    trackers.close()
    trackers.log("train", record)
    assert hosted[name].calls == [
        ("init", "mlx-openelm", tmp_path.name),
        (7, {"train/loss": 2.0}),
        (7, {"sample": [["step", "text"], [7, "Once"]]}),
        "finish",
    ]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "tracking starts\n")


def test_a_tracker_that_fails_is_left_out_and_the_others_stay(hosted, tmp_path):
    failures = []
    trackers = open_trackers(tmp_path, "wandb", "trackio", failures=failures)
    hosted["wandb"].broken = True
    for step in (1, 2):
        trackers.log("train", {"step": step, "loss": 1.0})
    assert failures == ["wandb failed and gets no more metrics: no network"]
    assert [call[0] for call in hosted["trackio"].calls] == ["init", 1, 2]


def test_a_tracker_that_cannot_start_is_an_error_and_the_others_end(hosted, tmp_path):
    hosted["trackio"].broken = True
    with pytest.raises(OpenELMError, match="trackio could not start: no key"):
        open_trackers(tmp_path, "wandb", "trackio")
    assert hosted["wandb"].calls[-1] == "finish"


def test_a_missing_package_is_reported_with_its_extra(monkeypatch):
    monkeypatch.setattr("mlx_openelm.reporting.trackers.find_spec", lambda name: None)
    with pytest.raises(OpenELMError, match=r"pip install 'mlx-openelm\[wandb\]'"):
        require_trackers(["wandb"])
    with pytest.raises(OpenELMError, match="choose tensorboard, wandb, trackio"):
        require_trackers(["mlflow"])


def test_tensorboard_has_numbers_and_texts_and_drops_superseded_steps(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    for first_step, loss in ((0, 5.0), (2, 1.0)):
        trackers = open_trackers(tmp_path, "tensorboard", first_step=first_step)
        for step in range(first_step + 1, 5):
            trackers.log("train", {"step": step, "loss": loss})
            trackers.log_text(step, "sample", "Once")
        trackers.close()
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    logged = [(scalar.step, scalar.value) for scalar in read.Scalars("train/loss")]
    assert logged == [(1, 5.0), (2, 5.0), (3, 1.0), (4, 1.0)]
    assert {text.step for text in read.Tensors("sample")} == {1, 2, 3, 4}
