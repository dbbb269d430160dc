"""A result is written completely or not at all, and no existing file is lost."""

import errno
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from commands import call, expect_error, make_source, snapshot
from places import ROOT, SUPPORT

from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage import staging
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.storage.staging import lock_file, staged_file, staged_folder

CONVERT = ("convert", "source", "--quiet")


def a_project(folder):
    """A project folder with a config.json that is not a model's."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "package.json").write_text("{}")


def notes_in_a_model(folder):
    shutil.copytree("model", folder)
    (folder / "thesis.txt").write_text("a year's work")


def a_folder_in_a_model(folder):
    shutil.copytree("model", folder)
    (folder / "thesis").mkdir()


def a_link_to_a_model(folder):
    folder.symlink_to("model")


def a_link_to_nothing(folder):
    folder.symlink_to("nowhere")


def a_file(path):
    path.write_text("a year's work")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (a_file, "is not a model or adapter folder"),
        (a_project, "is not a model or adapter folder"),
        (a_link_to_a_model, "is not a model or adapter folder"),
        (a_link_to_nothing, "is not a model or adapter folder"),
        (notes_in_a_model, "holds thesis.txt"),
        (a_folder_in_a_model, "holds thesis"),
    ],
)
def test_only_a_model_folder_is_replaced(here, make, reason):
    make(here / "out")
    args = (*CONVERT, "--mlx-path", "out")
    refused = "so --force does not replace it"
    message = [f"out exists already; it {reason}", refused]
    expect_error(here, *args, message=message)  # --force is not proposed
    expect_error(here, *args, "--force", message=[f"out {reason}", refused])
    assert os.path.lexists("out")


def test_force_replaces_a_model(here):
    args = (*CONVERT, "--mlx-path", "model", "--tokenizer", "none")
    expect_error(here, *args, message=["model exists already", "--force"])
    (here / "model" / ".DS_Store").write_text("the Finder's")
    result = call(*args, "--force")
    assert (result.exit_code, result.stdout) == (0, "model\n")
    assert not (here / "model" / "tokenizer.model").exists()  # no old file is left
    assert open_folder(here / "model")
    assert sorted(path.name for path in here.iterdir()) == ["model", "source"]


def test_force_replaces_an_empty_folder(here):
    (here / "out").mkdir()
    args = (*CONVERT, "--mlx-path", "out")
    expect_error(here, *args, message="out exists already")
    assert call(*args, "--force").exit_code == 0
    assert open_folder(here / "out")


def test_a_failed_replacement_leaves_the_old_model(here):
    make_source(here / "odd", {"norm.weight": np.full(64, np.nan, "f")})
    args = ("convert", "odd", "--mlx-path", "model", "--force")
    expect_error(here, *args, message="norm.weight holds NaN")


def test_force_never_loses_the_source(here):
    args = ("convert", "source", "--force", "--mlx-path")
    expect_error(here, *args, "source", message="source holds the source itself")
    expect_error(
        here, *args, str(here / "model" / ".." / "source"), message="the source itself"
    )
    (here / "link").symlink_to("source")
    expect_error(
        here, "convert", "link", *args[2:], "source", message="the source itself"
    )
    make_source(here / "model" / "inner")
    inner = ("convert", "model/inner", "--force", "--mlx-path", "model")
    expect_error(here, *inner, message="model holds")


@pytest.mark.parametrize("name", ["mit Leerzeichen", "日本/ü.model", "-x", "a/b/c/d"])
def test_a_target_of_any_name_and_depth_is_created(here, name):
    (here / "a").mkdir()
    result = call(*CONVERT, f"--mlx-path={name}")
    assert (result.exit_code, result.stdout) == (0, f"{name}\n")
    assert open_folder(here / name)
    assert not list(here.rglob("*.part"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("source/config.json", "source/config.json exists already"),
        ("source/config.json/out", "source/config.json"),
        ("source/config.json/a/b", "source/config.json"),
        ("x" * 250, "Cannot write"),
        ("x" * 300, "name too long"),
        (".", ". exists already"),
        ("", ". exists already"),
    ],
)
def test_an_impossible_target_is_reported(here, name, message):
    expect_error(here, *CONVERT, "--mlx-path", name, message=message)


def test_a_target_that_is_created_during_writing_is_not_lost(here):
    def write_and_let_another_create_it():
        with staged_folder(here / "new"):
            (here / "new").mkdir()
            (here / "new" / "thesis.txt").write_text("a year's work")

    with pytest.raises(OpenELMError, match="exists already"):
        write_and_let_another_create_it()
    assert (here / "new" / "thesis.txt").read_text() == "a year's work"
    assert sorted(path.name for path in here.iterdir()) == ["model", "new", "source"]


@pytest.mark.parametrize("error", [OSError("stale file handle"), KeyboardInterrupt()])
def test_without_an_atomic_exchange_the_old_model_is_restored(here, monkeypatch, error):
    """The file system cannot exchange names, and the second rename fails."""
    before = snapshot(here)
    rename = staging.Path.rename

    def fail(self, target):
        if self.suffix == ".done":
            raise error
        return rename(self, target)

    monkeypatch.setattr(staging, "_exchange", lambda a, b: False)
    monkeypatch.setattr(staging.Path, "rename", fail)
    with (
        pytest.raises((OpenELMError, KeyboardInterrupt)),
        staged_folder(here / "model", force=True) as folder,
    ):
        (folder / "config.json").write_text("{}")
    assert snapshot(here) == before


def test_a_second_ctrl_c_does_not_leave_the_hidden_folder(here, monkeypatch):
    before = snapshot(here)
    rmtree = shutil.rmtree
    calls = iter([KeyboardInterrupt])

    def interrupted(path, **options):
        for error in calls:
            raise error
        rmtree(path, **options)

    def write_and_stop(target):
        with staged_folder(target) as folder:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    monkeypatch.setattr(staging.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_and_stop(here / "a" / "b")
    assert snapshot(here) == before


def test_a_folder_has_the_permissions_of_the_umask(here):
    old = os.umask(0o022)
    try:
        with staged_folder(here / "new") as folder:
            (folder / "config.json").write_text("{}")
    finally:
        os.umask(old)
    assert (here / "new").stat().st_mode & 0o777 == 0o755


# Resuming ------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["new", "force"])
def test_after_a_kill_at_any_step_the_result_is_complete_or_absent(tmp_path, target):
    """See killing.py, which checks this after each kill and resumes."""
    result = subprocess.run(
        [sys.executable, SUPPORT / "killing.py", tmp_path, target],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr.decode()
    assert int(result.stdout) > 20


def stop(target, error, *, job, shards=1):
    """Write some shards and other files, then raise an error; return it."""

    def write_and_stop():
        with staged_folder(target, job=job) as folder:
            for i in range(1, shards + 1):
                (folder / f"model-0000{i}-of-00003.safetensors").write_text("whole")
            (folder / "model-00003-of-00003.safetensors.part").write_text("half")
            (folder / "config.json").write_text("{}")
            (folder / "more").mkdir()
            raise error

    with pytest.raises(type(error)) as caught:
        write_and_stop()
    return caught.value


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_run_resumes(tmp_path, error):
    target = tmp_path / "deep" / "out"
    stopped = stop(target, error, job={"bits": 4}, shards=2)
    assert stopped.__notes__ == ["The same command resumes from 2 complete shards."]
    assert not target.exists()
    with staged_folder(target, job={"bits": 4}) as folder:  # only complete shards
        names = sorted(path.name for path in folder.iterdir())
        assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2)]
    assert list(target.parent.iterdir()) == [target]
    assert len(list(target.iterdir())) == 2


@pytest.mark.parametrize(
    ("error", "job", "shards"),
    [
        (KeyboardInterrupt(), {"bits": 4}, 0),
        (KeyboardInterrupt(), None, 2),
        (SystemExit(143), None, 2),
        (OpenELMError("The source is damaged."), {"bits": 4}, 2),
        (AssertionError(), {"bits": 4}, 2),
    ],
)
def test_a_run_that_cannot_be_resumed_is_removed(tmp_path, error, job, shards):
    stopped = stop(tmp_path / "a" / "b" / "out", error, job=job, shards=shards)
    assert not hasattr(stopped, "__notes__")
    assert not list(tmp_path.iterdir())


def test_another_job_starts_again_and_removes_leftovers(tmp_path):
    target = tmp_path / "out"
    stop(target, KeyboardInterrupt(), job={"bits": 4})
    with staged_folder(target, job={"bits": 5}) as folder:
        assert not list(folder.iterdir())
        assert {path.suffix for path in tmp_path.iterdir()} == {".lock", ".part"}
        assert len(list(tmp_path.iterdir())) == 2  # only those of this job
    assert list(tmp_path.iterdir()) == [target]


def test_a_run_without_a_job_removes_leftovers_and_does_not_resume(tmp_path):
    target = tmp_path / "out"
    stop(target, KeyboardInterrupt(), job={"bits": 4})
    with staged_folder(target) as folder:
        assert not list(folder.iterdir())
    assert list(tmp_path.iterdir()) == [target]


def test_only_our_own_leftovers_are_removed(tmp_path):
    stop(tmp_path / "other", KeyboardInterrupt(), job={})  # of another target
    stop(tmp_path / "out.x", KeyboardInterrupt(), job={})
    for name in (
        ".out.part",
        ".out.0123456789ab.part",  # without a lock
        ".out.1123456789ab.part",  # a lock that is not ours
        ".out.2123456789ab",
        "out.3123456789ab.part",
        ".out.not-hex-at-al.part",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("a year's work")
    (tmp_path / ".out.1123456789ab.lock").write_text("4711")
    shutil.copy(
        next(tmp_path.glob(".other.*.lock")), tmp_path / ".out.not-hex-at-al.lock"
    )
    shutil.copy(
        next(tmp_path.glob(".other.*.lock")), tmp_path / "out.3123456789ab.lock"
    )
    before = snapshot(tmp_path)
    with staged_folder(tmp_path / "out", job={"bits": 4}):
        pass
    (tmp_path / "out").rmdir()
    assert snapshot(tmp_path) == before


def test_a_link_in_place_of_the_hidden_folder_is_not_followed(tmp_path):
    stop(tmp_path / "out", KeyboardInterrupt(), job={})
    (part,) = tmp_path.glob("*.part")
    shutil.rmtree(part)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("a year's work")
    part.symlink_to("precious")
    with staged_folder(tmp_path / "out", job={}) as folder:
        assert not list(folder.iterdir())
    assert (tmp_path / "precious" / "thesis.txt").exists()
    assert (tmp_path / "out").is_dir()


HOLD = """
import sys
from pathlib import Path
from mlx_openelm.storage.staging import staged_folder
with staged_folder(Path(sys.argv[1]), job={"bits": 4}) as folder:
    (folder / "model.safetensors").write_text("whole")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path):
    target = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with holder:
        assert holder.stdout.readline() == b"ready\n"
        before = snapshot(tmp_path)
        with (
            pytest.raises(OpenELMError, match="out is being written by another proc"),
            staged_folder(target, job={"bits": 4}),
        ):
            pass
        with staged_folder(tmp_path / "out.2", job={"bits": 4}):
            pass
        (tmp_path / "out.2").rmdir()
        with pytest.raises(KeyError), staged_folder(target, job={"bits": 5}):
            raise KeyError  # another job may start and does not touch the first
        assert snapshot(tmp_path) == before
        holder.kill()
    with staged_folder(target, job={"bits": 4}) as folder:
        assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert list(tmp_path.iterdir()) == [target]


# One file ------------------------------------------------------------------------

PT, GGUF = b"PK\x03\x04 and so on", b"GGUF and so on"


def test_a_file_appears_only_when_complete(tmp_path):
    target = tmp_path / "deep" / "out.gguf"
    with staged_file(target) as path:
        assert path.suffix == ".gguf"
        path.write_bytes(GGUF)
        assert not target.exists()
    assert target.read_bytes() == GGUF
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    "error", [OpenELMError("No."), OSError("No."), KeyboardInterrupt(), SystemExit(1)]
)
def test_a_failed_write_leaves_the_old_file(tmp_path, error):
    (tmp_path / "out.pt").write_bytes(PT)
    before = snapshot(tmp_path)

    def write_and_fail():
        with staged_file(tmp_path / "out.pt", force=True) as path:
            path.write_bytes(b"PK")
            raise error

    with pytest.raises((OpenELMError, KeyboardInterrupt, SystemExit)):
        write_and_fail()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("name", "content"), [("a.pt", PT), ("a.gguf", GGUF)])
def test_force_replaces_a_file_of_its_kind(tmp_path, name, content):
    (tmp_path / name).write_bytes(content + b"old")
    with (
        pytest.raises(OpenELMError, match="exists already"),
        staged_file(tmp_path / name),
    ):
        pass
    with staged_file(tmp_path / name, force=True) as path:
        path.write_bytes(content + b"new")
    assert (tmp_path / name).read_bytes() == content + b"new"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.pt", GGUF),
        ("a.gguf", PT),
        ("a.gguf", b""),
        ("a.txt", PT),
        ("a", GGUF),
        ("a.pt", None),
        ("a.pt", "link.pt"),
    ],
)
def test_a_file_of_another_kind_is_never_replaced(tmp_path, name, content):
    (tmp_path / "link.pt").write_bytes(PT)
    if content is None:
        (tmp_path / name).mkdir()
    elif isinstance(content, str):
        (tmp_path / name).symlink_to(content)
    else:
        (tmp_path / name).write_bytes(content)
    before = snapshot(tmp_path)
    with (
        pytest.raises(OpenELMError, match=r"is not a .* file, so `force` does not"),
        staged_file(tmp_path / name, force=True),
    ):
        pass
    assert snapshot(tmp_path) == before


def test_a_file_that_is_created_during_writing_is_not_lost(tmp_path):
    target = tmp_path / "out.pt"

    def write_and_let_another_create_it():
        with staged_file(target) as path:
            path.write_bytes(PT)
            target.write_text("a year's work")

    with pytest.raises(OpenELMError, match="exists already"):
        write_and_let_another_create_it()
    assert target.read_text() == "a year's work"
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_a_killed_run_are_removed_by_the_next(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from mlx_openelm.storage.staging import staged_file
with staged_file(Path(sys.argv[1])) as path:
    path.write_bytes(b"GG")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    target = tmp_path / "out.gguf"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code, target], env=environment)
    assert result.returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    assert not target.exists()
    with staged_file(target) as path:
        assert not path.exists()
        path.write_bytes(GGUF)
    assert list(tmp_path.iterdir()) == [target]


def test_a_lock_file_excludes_others_and_is_removed_afterwards(tmp_path):
    path = tmp_path / "lock"
    with (
        lock_file(path, "mine"),
        pytest.raises(OpenELMError, match="other"),
        lock_file(path, "other"),
    ):
        pass
    assert not path.exists()


def test_a_file_system_without_locks_is_refused_if_a_lock_is_required(
    tmp_path, monkeypatch
):
    def fail(*arguments):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(staging.fcntl, "flock", fail)
    with pytest.raises(OSError, match="no locks"), lock_file(tmp_path / "a", "in use"):
        pass
    with lock_file(tmp_path / "b", "in use", required=False):
        assert (tmp_path / "b").exists()
