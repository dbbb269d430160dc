"""SentencePiece models for tests: a small one, Llama's, and edited tokenizer.json."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from places import SHARED

from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.text.tokenizer_json import describe

LLAMA = SHARED / "data" / "llama-tokenizer" / "tokenizer.model"
SIZE = 600  # pieces of the small tokenizer

Edit = Callable[[dict[str, Any]], object]


def train(**options: Any) -> Tokenizer:
    """Train a small tokenizer on random words; `options` override Llama's settings."""
    rng = random.Random(0)
    parts = ["the", "a", "on", "er", "ing", "st", "ré", "日本", "aba", "bab", "12", "-"]
    words = ["".join(rng.choices(parts, k=rng.randint(1, 4))) for _ in range(300)]
    lines = [
        rng.choice(["", " ", "    ", "        "])
        + rng.choice([" ", " ", "  "]).join(rng.choices(words, k=8))
        for _ in range(300)
    ]
    written = io.BytesIO()
    settings_of_llama: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": SIZE,
        "character_coverage": 0.9999,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "pad_id": -1,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        **settings_of_llama | options,
    )
    return Tokenizer(written.getvalue())


def read_llama() -> Tokenizer:
    if not LLAMA.is_file():
        pytest.skip(f"needs Llama 2's tokenizer at {LLAMA}")
    return Tokenizer.from_file(LLAMA)


def pieces_of(proto: bytes) -> Any:
    """Parse a model with SentencePiece's own reader, as a reference for ours."""
    pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    return pb2.ModelProto.FromString(proto)


def edited(tokenizer: Tokenizer, folder: Path, edit: Edit) -> Path:
    """Write only the tokenizer.json, changed by `edit`, into a folder."""
    description = json.loads(json.dumps(describe(tokenizer)))
    edit(description)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(description))
    return file
