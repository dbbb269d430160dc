"""Folders of the released sizes with random weights, in bfloat16 and 4 bits.

    python benchmarks/random_models.py FOLDER SIZE...

Writes FOLDER/SIZE and FOLDER/SIZE-4bit, with the demo model's tokenizer.
"""

import json
import shutil
import sys
from pathlib import Path

import mlx_openelm

import mlx.core as mx  # isort: skip

from mlx_openelm.bench.models import Form, make_model
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.storage.hub import demo_folder
from mlx_openelm.training.arrays import flatten


def write(folder: Path, size: str) -> None:
    config = OpenELMConfig.preset(size)
    model = make_model(config, Form(mx.bfloat16, {}))
    folder.mkdir(parents=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        flatten(model.parameters()),
        {"format": "mlx"},
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    for file in demo_folder().glob("tokenizer*"):
        shutil.copy(file, folder)


def main(parent: Path, sizes: list[str]) -> None:
    for size in sizes:
        write(parent / size, size)
        mlx_openelm.convert(parent / size, parent / f"{size}-4bit", bits=4)
        print(size)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
