"""Learned scales: what a stopped run resumes from, and sources in other modes."""

import json
import shutil

import pytest
from commands import call, expect_error, make_source
from models import EVEN, TEXT

import converters.quantization.learning as learning
from converters.conversion.run import convert
from converters.quantization.learning import BATCH
from converters.quantization.teachers import LoadedTeacher


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = make_source(tmp_path_factory.mktemp("resumed") / "source", config=EVEN)
    (folder / "text.txt").write_text(TEXT)
    return folder


def quantize(source, target, learn="6steps", **options):
    chosen = {"bits": 3, "group_size": 32, "calibration": source / "text.txt"}
    return convert(source, target, learn=learn, **(chosen | options))


def stop_at(units, done):
    def stop(progress):
        if progress.units.startswith(units) and progress.done == done:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("changed", ["tokenizer.model", "config.json"])
def test_a_changed_tokenizer_or_config_starts_again(
    source, tmp_path, monkeypatch, changed
):
    monkeypatch.setattr(learning, "SAVE_SECONDS", 0.0)
    folder, seen = shutil.copytree(source, tmp_path / "source"), []
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, tmp_path / "out", on_progress=stop_at("steps", 4))
    if changed == "config.json":
        raw = json.loads((folder / changed).read_text())
        raw["rope_freq_constant"] = 20000
        (folder / changed).write_text(json.dumps(raw))
    else:
        (folder / changed).write_bytes((folder / changed).read_bytes())  # another time
    quantize(folder, tmp_path / "out", on_progress=seen.append)
    assert next(p for p in seen if p.units.startswith("steps")).done == 1


def test_a_run_that_has_saved_nothing_leaves_nothing(source, tmp_path):
    """The cache of the teacher remains: the windows held out, and the first others."""
    cache, starts = tmp_path / "cache", []

    def stop(progress):
        if progress.units.startswith("windows") and progress.done == 0:
            starts.append(progress)
        if len(starts) == 2 and progress.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        quantize(source, tmp_path / "out", teacher_cache=cache, on_progress=stop)
    kept = starts[0].total + 1
    assert len(list(cache.glob("*.safetensors"))) == kept
    assert stopped.value.__notes__ == [
        f"{cache} keeps {kept} windows that the teacher has read."
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_the_windows_of_many_steps_are_listed_once(source, tmp_path, monkeypatch):
    listed = []

    def prepare(self, windows):
        listed.append([tuple(window) for window in windows.tolist()])
        if len(listed) == 2:  # after those that are held out
            raise KeyboardInterrupt

    monkeypatch.setattr(LoadedTeacher, "prepare", prepare)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", "999999999steps")
    assert len(set(listed[1])) == len(listed[1]) > BATCH


@pytest.mark.parametrize("command", ["convert", "fuse"])
def test_tensors_that_stay_in_mxfp4_are_refused(source, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    convert(source, "packed", mode="mxfp4", receipt=False)
    if command == "convert":
        options = ("packed", "--q-bits", "3", "--q-keep", "out_proj", "--mlx-path")
        advice = "leave out --q-keep"
    else:
        (tmp_path / "train.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
        tuned = call(
            "lora", "--model", "packed", "--data", "train.jsonl", "--iters", "1",
            "--adapter-path", "tuned", "--quiet",
        )  # fmt: skip
        assert tuned.exit_code == 0, tuned.stderr
        options = ("--adapter-path", "tuned", "--save-path")
        advice = "add --q-bits"
    expect_error(
        tmp_path, command, *options, "out", "--learn", "2steps",
        message=f"--learn cannot train the scales of mxfp4, in which tensors of the "
        f"source stay: they are powers of two; {advice}.",
    )  # fmt: skip
