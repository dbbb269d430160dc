"""Small pre-training runs for tests."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from models import TEXT
from places import ROOT
from ports import free_ports

from converters.pretraining.recipe import (
    DataRecipe,
    ModelRecipe,
    OptimizerRecipe,
    PretrainRecipe,
    TokenizerRecipe,
)


def small_recipe(folder: Path) -> PretrainRecipe:
    """A recipe of twelve steps on packed text, with its files in `folder`."""
    (folder / "train.txt").write_text(TEXT * 2)
    (folder / "heldout.txt").write_text(TEXT[:600])
    return PretrainRecipe(
        model=ModelRecipe(
            num_layers=2,
            model_dim=32,
            head_dim=16,
            num_gqa_groups=1,
            ffn_dim_divisor=16,
            max_context_length=32,
        ),
        data=DataRecipe(
            train=(str(folder / "train.txt"),),
            heldout=(str(folder / "heldout.txt"),),
            packing=True,
        ),
        tokenizer=TokenizerRecipe(vocab_size=300),
        optimizer=OptimizerRecipe(learning_rate=5e-3, warmup_steps=4),
        output=str(folder / "run"),
        steps=12,
        batch_size=4,
        report_every=1,
        eval_every=6,
        save_every=4,
        eval_window=16,
        average_last=2,
    )


def streamed_data(folder: Path, documents: int = 40) -> DataRecipe:
    """Streamed documents of different lengths, one per padded sequence."""
    path = folder / "train.jsonl"
    lines = (
        json.dumps({"text": f"{number} {TEXT[: 40 + 7 * number % 90]}"})
        for number in range(documents)
    )
    path.write_text("\n".join(lines))
    return DataRecipe(
        train=(str(path),), min_tokens=1, min_characters=1, shuffle_block=8
    )


def read_metrics(output: str | Path, event: str = "trained") -> list[dict]:
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [record for x in lines if (record := json.loads(x))["event"] == event]


def read_losses(output: str | Path) -> list[float]:
    return [record["loss"] for record in read_metrics(output)]


def start_ranks(folder: Path, jobs: list[dict], count: int = 2) -> list:
    """Start processes that run these jobs one after another; see ranks.py."""
    path = folder / "jobs.json"
    for each, port in zip(jobs, free_ports(len(jobs)), strict=True):
        each["port"] = port
    path.write_text(json.dumps(jobs))
    shared = {
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": str(count),
    }
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/support/ranks.py"), str(path)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def run_ranks(folder: Path, jobs: list[dict], count: int = 2) -> list[list[str]]:
    """Run the jobs; return the line that each process printed after each job."""
    processes = start_ranks(folder, jobs, count)
    try:
        printed = []
        for process in processes:
            out, err = process.communicate(timeout=200)
            assert process.returncode == 0, err
            printed.append(out.splitlines())
        return printed
    finally:
        for process in processes:
            with process:  # waits for it
                process.kill()


def job(recipe: PretrainRecipe, *, resume: bool | str = False, **files: str) -> dict:
    """One run for ranks.py; `rankN="..."` is data.train in process N."""
    return {"recipe": asdict(recipe), "resume": resume, "files": files}
