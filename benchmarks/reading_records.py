"""Time and memory to read and tokenize many short records for `lora`.

    python benchmarks/reading_records.py CHECKOUT... [--records 1000000] [--rounds 3]

Each checkout prepares the same run in a process of its own, in turn, so that another
load on the machine affects all of them alike; the best of the rounds counts. Prints the
seconds, the seconds of all cores, the peak memory, and a hash of all token ids and loss
masks, which must be the same. The exit status is 1 if it is not.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = "the king went to the wood and saw a sheep there he was glad of it"
PREPARE = """
import hashlib, json, resource, sys, time
from mlx_openelm.finetuning.preparation import prepare
from mlx_openelm.finetuning.recipe import FinetuneRecipe

started = time.perf_counter()
prepared = prepare(FinetuneRecipe(data=sys.argv[1]))
seconds = time.perf_counter() - started
usage = resource.getrusage(resource.RUSAGE_SELF)
unit = 1 if sys.platform == "darwin" else 1024
ids = hashlib.sha256()
for samples in (prepared.train, prepared.valid):
    for sample in samples:
        ids.update(sample.tokens.tobytes() + sample.loss_mask.tobytes())
print(json.dumps({
    "seconds": seconds,
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "peak_bytes": usage.ru_maxrss * unit,
    "ids": ids.hexdigest(),
}))
"""


def write_records(path: Path, count: int) -> None:
    """Write records of about 58 bytes."""
    chance, words = random.Random(0), WORDS.split()
    with path.open("w") as opened:
        for _ in range(count):
            prompt, answer = (" ".join(chance.choices(words, k=k)) for k in (4, 2))
            record = {"prompt": f"{prompt}?", "completion": answer}
            opened.write(json.dumps(record) + "\n")


def measure(checkout: Path, data: Path) -> dict[str, float | str]:
    """Prepare a run with the code of one checkout."""
    result: dict[str, float | str] = json.loads(
        subprocess.run(
            [sys.executable, "-c", PREPARE, str(data)],
            env={**os.environ, "PYTHONPATH": str(checkout)},
            cwd=data.parent,
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
    )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs="+", type=Path)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    checkouts = [checkout.resolve() for checkout in options.checkouts]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "records.jsonl"
        write_records(data, options.records)
        size = data.stat().st_size / 1e6
        print(f"{options.records:,} records, {size:.0f} MB")
        results: dict[Path, list[dict[str, float | str]]] = {c: [] for c in checkouts}
        for _ in range(options.rounds):
            for checkout in checkouts:
                results[checkout].append(measure(checkout, data))
    ids = set()
    for checkout, rounds in results.items():
        best = {key: min(r[key] for r in rounds) for key in rounds[0]}
        ids |= {r["ids"] for r in rounds}
        print(
            f"{checkout}: {best['seconds']:.1f} s, {best['cpu_seconds']:.1f} s of all "
            f"cores, {best['peak_bytes'] / 1e9:.2f} GB, ids {best['ids'][:12]}"
        )
    return len(ids) > 1


if __name__ == "__main__":
    sys.exit(main())
