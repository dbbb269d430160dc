"""Processes that torchrun starts again, with its store, which outlives them."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from places import ROOT
from pretrainings import read_losses, read_metrics, small_recipe, streamed_data

torch = pytest.importorskip("torch", reason="needs PyTorch")

import torch.distributed as dist  # noqa: E402

from converters.pretraining.checkpoints import LAST, as_json  # noqa: E402
from converters.pretraining.processes import meet_processes  # noqa: E402
from converters.pretraining.run import pretrain  # noqa: E402
from mlx_openelm.errors import OpenELMError  # noqa: E402


@pytest.fixture
def torchruns_store(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def test_a_new_start_has_no_entries_of_an_earlier_one(torchruns_store):
    for start in range(3):
        stores = {}

        def meet(rank, stores=stores):
            stores[rank] = meet_processes(rank, 2, 20)

        threads = [threading.Thread(target=meet, args=(rank,)) for rank in (1, 0)]
        for thread in threads:  # the first process comes last
            thread.start()
            time.sleep(0.3)
        for thread in threads:
            thread.join()
        assert not stores[0].check(["address"])
        stores[0].set("address", str(start))
        assert stores[1].get("address") == str(start).encode()
        stores.clear()
        gc.collect()  # the processes end; torchrun's store remains


def test_a_missing_first_process_is_named(torchruns_store):
    with pytest.raises(OpenELMError, match=r"Process 0 on 127\.0\.0\.1 did not start"):
        meet_processes(1, 2, 0.5)


@pytest.mark.proof
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_one_restart_suffices_for_a_killed_process(tmp_path):
    recipe = replace(
        small_recipe(tmp_path), data=streamed_data(tmp_path), steps=40, save_every=5
    )
    whole = replace(recipe, output=str(tmp_path / "whole"))
    pretrain(whole)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(as_json(recipe)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", "-m", "mlx_openelm"]
    command += ["pretrain", "-c", str(path), "--resume", "auto"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True
    ) as run:
        deadline = time.monotonic() + 120
        while not (Path(recipe.output) / LAST).exists():
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text()
        os.kill(int(children.split()[-1]), signal.SIGKILL)
        _, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    starts = [record["first_step"] for record in read_metrics(recipe.output, "started")]
    assert len(starts) == 2
    assert 5 <= starts[1] < recipe.steps
    assert read_losses(recipe.output) == pytest.approx(
        read_losses(whole.output), abs=1e-5
    )
