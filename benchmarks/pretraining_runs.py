"""Pre-training runs for comparisons: run them and read their logs.

A finished run is reused and a stopped one resumes, so a script can be started again.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def pretrain(recipe: Path, output: Path, *flags: str) -> Path:
    """Train a recipe into a folder, unless it is finished; return the weights."""
    weights = output / "checkpoint_average.pt"
    if not weights.exists():
        if (output / "training_checkpoint_last.pt").exists():
            flags = (*flags, "--resume")
        print(f"{output}: {recipe}", flush=True)
        run("pretrain", "-c", str(recipe), "--output", str(output), *flags)
    return weights


def derive(recipe: Path, copy: Path, changes: Mapping[str, Any]) -> Path:
    """Write a copy of a recipe with other values of some keys; sections are merged."""
    entries = yaml.safe_load(recipe.read_text())
    for key, value in changes.items():
        entries[key] = entries[key] | value if isinstance(value, dict) else value
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(yaml.safe_dump(entries, sort_keys=False))
    return copy


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "mlx_openelm", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def read_scores(output: Path) -> dict[int, float]:
    """Return the held-out loss in nats per token by step; the last line counts."""
    events = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {
        event["step"]: event["nats_per_token"]
        for event in events
        if event["event"] == "evaluated"
    }


def refuse_other_tokenizers(outputs: list[Path]) -> None:
    """Exit if tokenizers differ: then losses per token are not comparable."""
    if len({(output / "tokenizer.model").read_bytes() for output in outputs}) > 1:
        sys.exit(f"the tokenizers differ: {', '.join(map(str, outputs))}")
