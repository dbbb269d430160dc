"""Learned scales with the teacher's outputs on disk: same results, checked folders."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from commands import call, expect_error, make_source
from models import EVEN, TEXT

import converters.conversion.learning as conversion_learning
import converters.quantization.learning as learning
from converters.conversion.run import convert
from converters.quantization.teachers import CachedTeacher
from mlx_openelm.errors import OpenELMError

CHOSEN = ("--q-bits", "3", "--q-group-size", "32", "--calibration", "text.txt")
LEARN = (*CHOSEN, "--learn", "3steps", "--teacher-cache", "cache", "--quiet")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = make_source(tmp_path_factory.mktemp("caches") / "source", config=EVEN)
    (folder / "text.txt").write_text(TEXT * 4)
    return folder


@pytest.fixture
def there(source, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def quantize(source, target, learn="6steps", **options):
    chosen = {"bits": 3, "group_size": 32, "calibration": source / "text.txt"}
    return convert(source, target, learn=learn, **(chosen | options))


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def count_files(cache):
    return len(list(Path(cache).glob("*.safetensors")))


# Results -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"teacher_bits": 8}, {"bits": "auto:5", "group_size": None}],
    ids=str,
)
def test_the_divergence_is_that_of_a_teacher_in_memory(source, tmp_path, options):
    paths = {"memory": [], "cache": []}
    for name, seen in paths.items():
        cache = tmp_path / "outputs" if name == "cache" else None

        def record(progress, seen=seen):
            if progress.units.startswith("steps"):
                seen.append(float(progress.units.rpartition(" ")[2]))

        report = quantize(
            source, tmp_path / name, teacher_cache=cache, on_progress=record, **options
        )
        seen += [report.learned.mean_kl_before, report.learned.mean_kl_after]
    assert len(paths["cache"]) == 8
    assert np.allclose(paths["cache"], paths["memory"], rtol=1e-3, atol=1e-6)
    entries = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in paths
    ]
    for entry in entries:
        entry["mlx_openelm"] = None
    assert entries[0] == entries[1]


def test_only_the_windows_that_are_used_are_computed(source, tmp_path):
    cache = tmp_path / "cache"
    quantize(source, tmp_path / "few", "3steps", teacher_cache=cache)
    few = count_files(cache)
    quantize(source, tmp_path / "more", "5steps", teacher_cache=cache)
    more = count_files(cache)
    assert more == few + 2 * 2
    quantize(source, tmp_path / "fewer", "2steps", teacher_cache=cache)
    assert count_files(cache) == more


def test_a_whole_cache_needs_no_teacher(source, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    quantize(source, tmp_path / "one", teacher_cache=cache)
    build = conversion_learning._build_teacher

    def build_head(plan, bits, names=None):
        assert names is not None, "the whole teacher was loaded"
        return build(plan, bits, names)

    monkeypatch.setattr(conversion_learning, "_build_teacher", build_head)
    quantize(source, tmp_path / "two", teacher_cache=cache)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


@pytest.mark.parametrize("units", ["windows read by the teacher", "steps"])
def test_a_stopped_run_resumes_with_the_same_bytes(
    source, tmp_path, monkeypatch, units
):
    monkeypatch.setattr(learning, "SAVE_SECONDS", 0.0)
    quantize(source, tmp_path / "whole", teacher_cache=tmp_path / "cache")
    cache = tmp_path / "other"

    def stop(progress):
        if progress.units.startswith(units) and progress.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        quantize(source, tmp_path / "out", teacher_cache=cache, on_progress=stop)
    kept, first = count_files(cache), "windows" in units
    assert kept == 4 or not first
    assert stopped.value.__notes__[0].startswith(
        f"{cache} keeps 4 windows" if first else "The same command resumes from"
    )
    counts = []

    def count(progress):
        if progress.units.startswith("windows"):
            counts.append(progress.total)

    quantize(source, tmp_path / "out", teacher_cache=cache, on_progress=count)
    assert bool(counts) == first
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_minutes_read_the_windows_of_the_other_steps_later(
    source, tmp_path, monkeypatch
):
    clock = iter(range(10**6))
    monkeypatch.setattr(learning.time, "perf_counter", lambda: float(next(clock)))
    seen = []
    report = quantize(
        source, tmp_path / "out", "0.17", teacher_cache=tmp_path / "cache",
        on_progress=lambda p: seen.append(p.units.partition(",")[0]),
    )  # fmt: skip
    changes = [b for a, b in zip(["", *seen], seen, strict=False) if a != b]
    read = "windows read by the teacher"
    assert changes[:4] == [read, "steps", read, "steps"]
    assert report.learned.steps == 9


def test_a_fused_model_learns_from_a_cache(there):
    (there / "train.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    tuned = call(
        "lora", "--model", "source", "--data", "train.jsonl", "--adapter-path", "tuned",
        "--iters", "20", "--learning-rate", "1e-2", "--quiet",
    )  # fmt: skip
    assert tuned.exit_code == 0, tuned.stderr
    options = ("--adapter-path", "tuned", "--q-bits", "8", "--q-group-size", "32")
    learn = ("--learn", "3steps", "--quiet")
    for name in ("one", "two"):
        cached = (*learn, "--teacher-cache", "cache", "--save-path", name)
        fused = call("fuse", *options, *cached)
        assert fused.exit_code == 0, fused.stderr
    assert weights(there / "one") == weights(there / "two")
    assert count_files("cache") >= 3 * 2
    expect_error(
        there, "fuse", *options, "--save-path", "three", "--teacher-cache", "cache",
        message="--teacher-cache requires --learn",
    )  # fmt: skip


# Checked folders -------------------------------------------------------------------


def test_another_cache_is_noticed(there):
    assert call("convert", "source", *LEARN, "--mlx-path", "one").exit_code == 0
    make_source(there / "other", {"norm.weight": np.ones(64, np.float32)}, config=EVEN)
    (there / "text2.txt").write_text(TEXT * 5)
    for name, options, message in (
        ("other", (), "was computed with another teacher"),
        ("source", ("--calibration", "text2.txt"), "was computed with other data"),
        ("source", ("--teacher-bits", "8"), "with another teacher"),
    ):
        arguments = (*LEARN, "--mlx-path", "two", *options)
        expect_error(there, "convert", name, *arguments, message=message)


def test_folders_that_are_no_cache_of_hidden_states_are_refused(there):
    arguments = ("convert", "source", *LEARN, "--mlx-path", "out")
    for name, message in (
        ("source", "source exists and is not a cache"),
        ("text.txt", "text.txt exists and is not a cache"),
        ("out", "need separate folders"),
        ("out/cache", "need separate folders"),
        (".", "need separate folders"),
        ("", "--teacher-cache is empty"),
        ("text.txt/cache", "Cannot write"),
    ):
        expect_error(there, *arguments, "--teacher-cache", name, message=message)
    (there / "cache").mkdir()
    description = there / "cache" / "cache.json"
    for text, message in (
        ('{"format": 1, "content": "the most likely tokens"}', "not hidden states"),
        ('{"format": 2, "content": "hidden states"}', "another version"),
        ("{", "cache.json"),
        ("[]", "cache.json"),
    ):
        description.write_text(text)
        expect_error(there, *arguments, message=message)


def test_a_cache_of_hidden_states_is_refused_by_distillation(there):
    assert call("convert", "source", *LEARN, "--mlx-path", "one").exit_code == 0
    (there / "train.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    expect_error(
        there, "lora", "--model", "source", "--data", "train.jsonl", "--objective",
        "distill", "--teacher", "source", "--teacher-cache", "cache", "--iters", "1",
        message="has hidden states, not the most likely tokens",
    )  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_an_error(there):
    (there / "locked").mkdir(mode=0o500)
    expect_error(
        there, "convert", "source", *LEARN, "--mlx-path", "out", "--teacher-cache",
        "locked/cache", message="Cannot write",
    )  # fmt: skip


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "missing"])
def test_damaged_files_are_computed_again(source, tmp_path, damage):
    cache = tmp_path / "cache"
    quantize(source, tmp_path / "one", teacher_cache=cache)
    path = sorted(cache.glob("*.safetensors"))[0]
    before = path.read_bytes()
    if damage == "foreign":
        mx.save_safetensors(str(path), {"rows": mx.zeros((64, 32))}, {"format": "mlx"})
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(before[:-1] if damage == "truncated" else b"")
    quantize(source, tmp_path / "two", teacher_cache=cache)
    assert path.read_bytes() == before
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_a_file_that_is_damaged_during_learning_is_an_error(
    source, tmp_path, monkeypatch
):
    read = CachedTeacher._read

    def truncate(self, tokens):
        path = self._path(tokens)
        path.write_bytes(path.read_bytes()[:-1])
        return read(self, tokens)

    def stop(progress):
        if progress.units.startswith("steps"):
            monkeypatch.setattr(CachedTeacher, "_read", truncate)

    with pytest.raises(OpenELMError, match=r"damaged or missing; repeat the command"):
        quantize(
            source, tmp_path / "out", teacher_cache=tmp_path / "cache", on_progress=stop
        )
    assert not (tmp_path / "out").exists()
