"""Signals, full disks and closed pipes: no partial output is left."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import call, expect_error, snapshot
from places import ROOT

from converters.conversion import model_folder as folder_writing
from mlx_openelm.errors import OpenELMError

MAIN = "from mlx_openelm.cli.main import main; main()"
WAIT = """
import importlib, sys, time
module, name = sys.argv[1:3]
def wait(*args, **options):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
setattr(importlib.import_module(module), name, wait)
sys.argv[1:] = sys.argv[3:]
"""
CONVERT = ("convert", "source", "--mlx-path", "a/b", "--quiet")
GENERATE = ("generate", "Once", "--model", "model", "--quiet")
# The function that each command waits in: before the first weight or token
BUSY = {
    CONVERT: ("converters.conversion.model_folder", "ShardWriter"),
    GENERATE: ("mlx_openelm.generation.decoding", "choose_tokens"),
}
# All weights are written before this call.
WRITTEN = ("converters.conversion.model_folder", "write_tokenizer")


def start(*args, code=MAIN, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], env=environment, **pipes, **options
    )


def start_and_wait(args, busy):
    """Start a command; return the process once it waits in the function `busy`."""
    process = start(*busy, *args, code=WAIT + MAIN)
    assert process.stderr.readline() == b"ready\n"
    return process


# Signals -------------------------------------------------------------------------


@pytest.mark.parametrize("args", [CONVERT, GENERATE], ids=["convert", "generate"])
@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, b"Interrupted."), (signal.SIGTERM, 143, b"")],
)
def test_a_stopped_command_leaves_no_files(here, args, number, code, message):
    before = snapshot(here)
    process = start_and_wait(args, BUSY[args])
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, b"")
    assert b"Traceback" not in err
    assert err.strip() in (message, b"")
    assert snapshot(here) == before


def check_convert_resumes(here):
    """Check that the target is absent and the next run keeps the complete shard."""
    assert not (here / "a" / "b").exists()
    (shard,) = (here / "a").glob(".b.*.part/model.safetensors")
    inode = shard.stat().st_ino
    assert call(*CONVERT).exit_code == 0
    assert (here / "a" / "b" / "model.safetensors").stat().st_ino == inode
    assert [path.name for path in (here / "a").iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_stopped_convert_keeps_and_reports_complete_shards(here, number, code):
    process = start_and_wait(CONVERT, WRITTEN)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, b"")
    assert err.endswith(b"The same command resumes from 1 complete shard.\n")
    assert len(err.splitlines()) <= 2
    check_convert_resumes(here)


def test_a_killed_convert_leaves_no_target_and_resumes(here):
    process = start_and_wait(CONVERT, WRITTEN)
    process.kill()
    process.communicate(timeout=60)
    check_convert_resumes(here)


def test_a_killed_replacement_leaves_the_old_model(here):
    args = ("convert", "source", "--mlx-path", "model", "--force")
    old = snapshot(here / "model")
    process = start(*WRITTEN, *args, code=WAIT + MAIN)
    while process.stderr.readline() != b"ready\n":
        assert process.poll() is None
    process.kill()
    process.communicate(timeout=60)
    assert snapshot(here / "model") == old
    assert call(*args).exit_code == 0
    assert {path.name for path in here.iterdir()} == {"model", "source"}


@pytest.mark.parametrize(
    "args", [GENERATE, ("recipes", "show", "pretrain/stories"), ("--help",)]
)
def test_a_closed_pipe_is_not_an_error(here, args):
    with start(*args) as process:
        process.stdout.close()  # as `head` does, before the first byte
        err = process.stderr.read()
    assert (process.returncode, err) == (0, b"")


def test_output_into_head_is_truncated_without_an_error(here):
    with start(*GENERATE) as process:
        head = subprocess.run(
            ["head", "-c", "12"], stdin=process.stdout, capture_output=True, check=True
        )
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert head.stdout == call(*GENERATE).stdout_bytes[:12]


# Disks ---------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1000, 200_000])
def test_a_write_that_fails_is_reported_and_undone(here, limit):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    before = snapshot(here)
    process = start(*CONVERT, "--dtype", "float32", preexec_fn=limited)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, b"")
    assert err.startswith(b"error: Cannot write a/b: ")
    assert len(err.splitlines()) == 1
    assert snapshot(here) == before


@pytest.mark.parametrize("step", ["write_json", "write_tokenizer"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_reported(here, monkeypatch, step, wrapped):
    def fail(*args):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            if wrapped:
                raise OpenELMError("Cannot write.") from error
            raise

    monkeypatch.setattr(folder_writing, step, fail)
    expect_error(here, *CONVERT, message="The disk of a/b is full; nothing was kept.")


def test_a_disk_that_is_too_small_is_refused_before_writing(here, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(folder_writing.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(folder_writing, "ShardWriter", None)
    expect_error(here, *CONVERT, message=["a/b needs", "free some space"])


def test_a_full_disk_at_stdout_is_one_error_line(here):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full, which Linux has")
    with full.open("wb") as stdout:
        code = [sys.executable, "-c", MAIN, *GENERATE]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            code, stdout=stdout, stderr=subprocess.PIPE, env=environment
        )
    assert result.returncode == 1
    assert result.stderr.startswith(b"error: [Errno 28] No space left on device")
    assert len(result.stderr.splitlines()) == 1
