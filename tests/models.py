"""Small models, tokenizers and files that many tests make."""

import functools
import io
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import sentencepiece
from safetensors import safe_open

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from mlx_openelm.benchmark import made_weight
from mlx_openelm.checkpoint import write_json
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.model import OpenELM
from mlx_openelm.names import to_folder
from mlx_openelm.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"

TEXT = (
    "Once upon a time there was a king who had three daughters. The eldest said: "
    "I love you more than gold! The youngest wept, for she had nothing to say.\n\n"
    "Don't go into the wood, said the old woman; the wolf is there -- and 1234 more. "
) * 8

UNEVEN = OpenELMConfig(  # no two layers alike, groups of different size
    model_dim=64,
    head_dim=16,
    num_query_heads=(2, 4, 6),
    num_kv_heads=(1, 4, 2),
    ffn_dims=(96, 160, 64),
    vocab_size=300,
    max_context_length=64,
)


def weights_of(config: OpenELMConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by CoreNet name, none of them trivial."""
    return {
        name: made_weight(name, shape, seed)
        for name, shape in config.tensor_shapes().items()
    }


def build(config: OpenELMConfig, seed: int = 0) -> OpenELM:
    model = OpenELM(config)
    model.load_weights(
        [(to_folder(n), mx.array(w)) for n, w in weights_of(config, seed).items()]
    )
    return model


@functools.cache
def small_tokenizer(vocab_size: int = 300) -> Tokenizer:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_writer=written,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return Tokenizer(written.getvalue())


def write_pt(
    path: Path, weights: dict[str, np.ndarray], wrap: str | None = None
) -> Path:
    import torch

    state: dict = {name: torch.from_numpy(w) for name, w in weights.items()}
    torch.save({wrap: state, "iterations": 1} if wrap else state, path)
    return path


def write_hugging_face(
    folder: Path, config: OpenELMConfig, weights: dict[str, np.ndarray]
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {to_folder(name): mx.array(w) for name, w in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    write_json(folder / "config.json", config.to_dict())
    return folder


def read_golden(case: str) -> tuple[dict, dict, np.ndarray, np.ndarray, np.ndarray]:
    """Return metadata, shapes, tokens, positions and Apple's logits of a case."""
    with safe_open(GOLDEN / f"corenet-{case}.safetensors", framework="numpy") as stored:
        found = [stored.get_tensor(n) for n in ("tokens", "positions", "logits")]
        metadata = stored.metadata()
    shapes = json.loads((GOLDEN / f"corenet-{case}.shapes.json").read_text())
    return metadata, {n: tuple(s) for n, s in shapes.items()}, *found
