"""Runs of more than one node: peers that do not start, kills, torchrun and Slurm."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from places import ROOT
from ports import free_ports
from pretrainings import read_losses, read_metrics, small_recipe, streamed_data

torch = pytest.importorskip("torch", reason="needs PyTorch")

from converters.pretraining.checkpoints import LAST, as_json  # noqa: E402
from converters.pretraining.processes import (  # noqa: E402
    SharedError,
    join_processes,
    meet_processes,
)
from converters.pretraining.run import pretrain  # noqa: E402
from mlx_openelm.errors import OpenELMError  # noqa: E402

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
STEPS = 24
FIRST = "127.0.0.1"


@pytest.fixture
def recipe(tmp_path):
    recipe = replace(
        small_recipe(tmp_path), batch_size=4, steps=STEPS, save_every=5, keep_last=2
    )
    return replace(recipe, data=streamed_data(tmp_path))


# Peers that do not start ---------------------------------------------------------


def be_rank(monkeypatch, rank: int, count: int) -> None:
    (port,) = free_ports(1)
    for name, value in (
        *(("RANK", rank), ("WORLD_SIZE", count), ("LOCAL_RANK", rank)),
        *(("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)),
    ):
        monkeypatch.setenv(name, str(value))


def test_processes_that_do_not_start_are_named(monkeypatch):
    be_rank(monkeypatch, 0, 5)
    raised = []

    def meet(rank):
        try:
            meet_processes(rank, 5, 1.5)
        except SharedError as error:
            raised.append(error)

    for rank in (1, 3):
        threading.Thread(target=meet, args=(rank,)).start()
    with pytest.raises(OpenELMError) as refused, join_processes(1.5):
        pass
    assert str(refused.value) == (
        "Of 5 processes, 2 did not start within 2 seconds: 2, 4. Started: 0 to 1, 3 on "
        f"{socket.gethostname()}. Start the others, or set a longer join_timeout."
    )
    assert not isinstance(refused.value, SharedError)  # this one is printed
    deadline = time.monotonic() + 20
    while len(raised) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(raised) == 2


def test_a_first_process_that_cannot_be_reached_is_named(monkeypatch, capfd):
    be_rank(monkeypatch, 3, 4)
    port = os.environ["MASTER_PORT"]
    message = (
        rf"Process 3 on \S+ could not reach process 0 at 127\.0\.0\.1, port {port}, "
        "within 1 seconds"
    )
    with pytest.raises(OpenELMError, match=message), join_processes(0.6):
        pass
    assert capfd.readouterr().err == ""
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(OpenELMError, match="run with torchrun"), join_processes(1):
        pass


# Two nodes -----------------------------------------------------------------------


def published_command(recipe_path: Path, address: str, port: int) -> list[str]:
    """The command of the 270M's recipe, for this recipe and two nodes."""
    text = (ROOT / "recipes/pretrain/openelm-270m.yaml").read_text()
    (command,) = re.findall(r"^# +(TORCH\w+=1 torchrun(?:.*\n)+?.*auto)$", text, re.M)
    command = re.sub(r"\\\n#", "", command)
    for published, ours in (
        ("--nnodes 16 --nproc-per-node 8", "--nnodes 2 --nproc-per-node 1"),
        ("torchrun", f"{sys.executable} -m torch.distributed.run"),
        ("pretrain/openelm-270m --output RUN", str(recipe_path)),
        ("HOST:29400", f"{FIRST}:{port}"),
        # On one machine both nodes would claim the endpoint's address.
        ("join_timeout=3600", f"join_timeout=120,is_host={address == FIRST}"),
        ("-m mlx_openelm", f"--local-addr {address} -m mlx_openelm"),
    ):
        assert command.count(published) == 1
        command = command.replace(published, ours)
    return ["env", *shlex.split(command)]


class Node:
    """torchrun on a loopback address, in a process group of its own."""

    def __init__(self, recipe_path: Path, port: int, address: str):
        self.errors = recipe_path.with_name(f"{address}-{time.monotonic_ns()}.err")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                published_command(recipe_path, address, port),
                env=ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End the node as a power failure does; torchrun's workers have sessions."""
        children = descendants(self.process.pid)
        for pid in (self.process.pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with self.process:
            pass


def descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


def wait_for(path: Path, nodes=(), seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        for node in nodes:
            assert node.process.poll() is None, node.errors.read_text()
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


@pytest.mark.proof
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_killed_node_starts_again_and_the_batches_are_the_same(recipe, tmp_path):
    whole = replace(recipe, output=str(tmp_path / "whole"))
    pretrain(whole)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(as_json(recipe)))
    (port,) = free_ports(1)
    addresses = (FIRST, "127.0.0.2")
    nodes = [Node(path, port, address) for address in addresses]
    try:
        wait_for(Path(recipe.output) / LAST, nodes)
        nodes[1].kill()
        nodes[1] = Node(path, port, addresses[1])
        for node in nodes:
            node.process.communicate(timeout=240)
            assert node.process.returncode == 0, node.errors.read_text()
    finally:
        for node in nodes:
            node.kill()
    starts = [r["first_step"] for r in read_metrics(recipe.output, "started")]
    assert starts[0] == 0
    assert 5 <= starts[-1] < STEPS
    assert [r["step"] for r in read_metrics(recipe.output)] == list(range(1, STEPS + 1))
    losses = read_losses(recipe.output)
    assert losses == pytest.approx(read_losses(whole.output), abs=1e-5)
    page = (Path(recipe.output) / "report.html").read_text()
    assert f"{STEPS} of {STEPS} steps were trained." in page
    assert "Resumed at step" in page


# Slurm ---------------------------------------------------------------------------

SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
while sys.argv[1].startswith("--"):
    del sys.argv[1]
count = int(os.environ["SLURM_NTASKS"])
ids = [{{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}} for i in range(count)]
tasks = [subprocess.Popen(sys.argv[1:], env=os.environ | own) for own in ids]
with open("tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then
    printf '127.0.0.1\\n127.0.0.2\\n'
else
    echo "$@" >>requeued
fi
"""


@pytest.mark.proof
def test_the_slurm_script_starts_requeues_and_resumes(recipe, tmp_path):
    """Slurm's own commands are replaced by scripts with their interface."""
    whole = replace(recipe, output=str(tmp_path / "whole"))
    pretrain(whole)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(as_json(recipe)))
    programs = tmp_path / "bin"
    programs.mkdir()
    python = f'#!/bin/bash\nexec "{sys.executable}" "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),  # the port follows from it
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_NTASKS": "2",
        "PATH": f"{programs}:{os.environ['PATH']}",
    }

    def submit() -> subprocess.Popen:
        script = ROOT / "recipes/pretrain/slurm.sh"
        return subprocess.Popen(
            ["bash", script, path, "--quiet", "--output", recipe.output],
            cwd=tmp_path,
            env=ENVIRONMENT | slurm,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    job = submit()
    wait_for(Path(recipe.output) / LAST)
    for pid in map(int, (tmp_path / "tasks").read_text().split()):
        os.kill(pid, signal.SIGTERM)
    assert job.communicate(timeout=120)[0] == ""
    assert job.returncode == 143
    requeued = (tmp_path / "requeued").read_text()
    assert requeued == f"requeue {slurm['SLURM_JOB_ID']}\n"
    out, err = (job := submit()).communicate(timeout=240)
    assert job.returncode == 0, err
    assert out == f"{recipe.output}/checkpoint_average.pt\n"
    assert (tmp_path / "requeued").read_text() == requeued
    losses = read_losses(recipe.output)
    assert losses == pytest.approx(read_losses(whole.output), abs=1e-5)
