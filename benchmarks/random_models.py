"""Folders of the released sizes with random weights, in bfloat16 and 4 bits.

    python benchmarks/random_models.py FOLDER SIZE...

Writes FOLDER/SIZE and FOLDER/SIZE-4bit, with the demo model's tokenizer and unused
pieces for the other rows of the embedding.
"""

import json
import struct
import sys
import tempfile
from pathlib import Path

import mlx_openelm

import mlx.core as mx  # isort: skip

from mlx_openelm.bench.models import Form, make_model
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.storage.hub import demo_folder
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.training.arrays import flatten

ROWS = 32064  # with 32000, the tokenizer would have to be Llama's


def write(folder: Path, size: str) -> None:
    config = OpenELMConfig.preset(size, vocab_size=ROWS)
    model = make_model(config, Form(mx.bfloat16, {}))
    folder.mkdir(parents=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        flatten(model.parameters()),
        {"format": "mlx"},
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    demo = (demo_folder() / "tokenizer.model").read_bytes()
    known = Tokenizer(demo).num_ids
    added = b"".join(map(encode_piece, range(known, config.vocab_size)))
    (folder / "tokenizer.model").write_bytes(demo + added)


def encode_piece(number: int) -> bytes:
    """Return an entry of SentencePiece's file: a piece that no text contains."""
    piece = f"unused{number}".encode()
    entry = b"\x0a" + bytes([len(piece)]) + piece + b"\x15" + struct.pack("<f", -1e4)
    return b"\x0a" + bytes([len(entry)]) + entry


def main(parent: Path, sizes: list[str]) -> None:
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / size
            write(source, size)
            mlx_openelm.convert(source, parent / size)
            mlx_openelm.convert(source, parent / f"{size}-4bit", bits=4)
        print(size)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
