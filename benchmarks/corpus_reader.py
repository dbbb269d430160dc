"""Documents a second of the reader of corpora, from each format, by workers.

    python benchmarks/corpus_reader.py [--workers 1 2 4] [--seconds 10]
                                       [--tokenizer FILE]

Writes corpora of documents of about 600 words of English as JSON lines, gzip and
parquet, reads them with the data settings of the recipe of 270M (batches of 64), and
prints for each format and number of workers the documents a second, and those per
second of a core, which do not depend on other load. The last line is what the recipe
consumes on eight A100s at 40% of their peak.
"""

import argparse
import dataclasses
import gzip
import json
import os
import random
import tempfile
import time
from pathlib import Path

import pyarrow
from pyarrow import parquet

from converters.pretraining.loader import open_loader
from converters.pretraining.plan import (
    PEAK_FLOPS,
    UTILISATION,
    count_flops_per_token,
)
from converters.pretraining.recipe import CorpusRecipe, PretrainRecipe
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.recipe_loader import load_recipe
from mlx_openelm.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "converters" / "quantization" / "calibration.txt"
FORMATS = ("docs-{}.jsonl", "docs-{}.json.gz", "docs-{}.parquet")
DOCUMENTS, FILES = 6000, 4
LENGTH, BATCH = 2048, 64
DEVICES = 8


def write_corpora(folder: Path) -> None:
    """Write the same documents in each format, in some files."""
    chance = random.Random(0)
    paragraphs = [line for line in TEXT.read_text().splitlines() if line.strip()]
    for number in range(FILES):
        texts = []
        for _ in range(DOCUMENTS // FILES):
            chosen: list[str] = []
            while sum(len(text.split()) for text in chosen) < 600:
                chosen.append(chance.choice(paragraphs))
            texts.append("\n".join(chosen))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        (folder / FORMATS[0].format(number)).write_bytes(lines)
        (folder / FORMATS[1].format(number)).write_bytes(gzip.compress(lines, 6))
        parquet.write_table(
            pyarrow.table({"text": texts}),
            folder / FORMATS[2].format(number),
            row_group_size=100,
        )


def measure(
    recipe: PretrainRecipe, tokenizer: Tokenizer, seconds: float
) -> tuple[float, float]:
    """Return the documents per second, and per second of all cores."""
    loader = open_loader(recipe, tokenizer, LENGTH)
    before = os.times()
    try:
        for _ in range(5):  # the workers start, and fill their queues
            loader.next_batch()
        started, batches = time.perf_counter(), 0
        while time.perf_counter() < started + seconds:
            loader.next_batch()
            batches += 1
        elapsed = time.perf_counter() - started
    finally:
        loader.close()
    after = os.times()
    busy = after.children_user - before.children_user
    busy += after.children_system - before.children_system
    # What the workers had read ahead is little beside the rest.
    return batches * BATCH / elapsed, (batches + 5) * BATCH / busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument(
        "--tokenizer", type=Path, default=ROOT / "mlx_openelm/demo/tokenizer.model"
    )
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(options.tokenizer)
    published = load_recipe(PretrainRecipe, "pretrain/openelm-270m", {})
    with tempfile.TemporaryDirectory() as folder:
        write_corpora(Path(folder))
        for name in FORMATS:
            for workers in options.workers:
                files = (str(Path(folder) / name.format("*")),)
                data = dataclasses.replace(
                    published.data,
                    corpora=(CorpusRecipe(files),),
                    readers=16,
                    workers=workers,
                )
                recipe = dataclasses.replace(published, batch_size=BATCH, data=data)
                rate, by_core = measure(recipe, tokenizer, options.seconds)
                print(
                    f"{name.format('N'):16} {workers} workers: {rate:7,.0f} documents "
                    f"a second, {by_core:5,.0f} a second of a core",
                    flush=True,
                )
    flops = count_flops_per_token(OpenELMConfig.preset("270M"), LENGTH) * LENGTH
    consumed = DEVICES * UTILISATION * PEAK_FLOPS["A100"] / flops
    print(f"270M on {DEVICES} A100s consumes {consumed:,.0f} sequences a second")


if __name__ == "__main__":
    main()
