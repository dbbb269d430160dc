"""Pre-training runs that are compared: started one after another, read from their logs.

A run that is finished is taken as it is, and one that was stopped goes on, so a script
that is started again does only what is missing.
"""

import json
import subprocess
import sys
from pathlib import Path


def pretrain(recipe: Path, output: Path, *flags: str) -> Path:
    """Train by a recipe into a folder, unless that is done; return the weights."""
    weights = output / "checkpoint_average.pt"
    if not weights.exists():
        if (output / "training_checkpoint_last.pt").exists():
            flags = (*flags, "--resume")
        print(f"{output}: {recipe}", flush=True)
        run("pretrain", "-c", str(recipe), "--output", str(output), *flags)
    return weights


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "mlx_openelm", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def read_scores(output: Path) -> dict[int, float]:
    """Return the held-out loss in nats per token by step; a later line wins."""
    events = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {
        event["step"]: event["nats_per_token"]
        for event in events
        if event["event"] == "evaluated"
    }


def refuse_other_tokenizers(outputs: list[Path]) -> None:
    """Losses per token are comparable if the tokens are the same."""
    if len({(output / "tokenizer.model").read_bytes() for output in outputs}) > 1:
        sys.exit(f"the tokenizers differ: {', '.join(map(str, outputs))}")
