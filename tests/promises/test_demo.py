"""The built-in model: its files, size, tokenizer and the score of its card."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from converters.pretraining.recipe import PretrainRecipe
from mlx_openelm.bench.plan import PROMPT
from mlx_openelm.bench.selfcheck import GOLDEN, TEXT_TOKENS
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.evaluation.texts import evaluate
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import generate
from mlx_openelm.recipe_loader import load_recipe
from mlx_openelm.storage.hub import demo_folder
from mlx_openelm.storage.loading import load
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.storage.tokenizer_finder import verify_tokenizer
from mlx_openelm.text.tokenizer import SPACE, Tokenizer

DEMO = demo_folder()
tokenizer = Tokenizer.from_file(DEMO / "tokenizer.model")


def test_it_has_layer_wise_scaling_and_the_sizes_of_the_recipe():
    config = open_folder(DEMO).config
    recipe = load_recipe(PretrainRecipe, "pretrain/stories", {})
    assert config == recipe.model.build(recipe.tokenizer.vocab_size)
    assert config == OpenELMConfig.from_file(DEMO / "config.json")
    assert config.max_context_length >= 512
    for sizes in (config.num_query_heads, config.ffn_dims):
        assert list(sizes) == sorted(sizes)
        assert sizes[0] < sizes[-1]


def test_it_is_small_and_includes_its_training_log():
    size = sum(f.stat().st_size for f in DEMO.rglob("*") if f.is_file())
    assert size <= 16e6
    for name in ("README.md", "metrics.jsonl", "loss.png", "generation_config.json"):
        assert (DEMO / name).is_file(), name
    events = [json.loads(x) for x in (DEMO / "metrics.jsonl").read_text().splitlines()]
    recipe = load_recipe(PretrainRecipe, "pretrain/stories", {})
    assert [e for e in events if e["event"] == "trained"][-1]["step"] == recipe.steps


@given(st.text(st.characters(exclude_characters=SPACE, exclude_categories=["Cs"])))
def test_its_tokenizer_is_lossless(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_its_tokenizer_has_llamas_settings():
    verify_tokenizer(tokenizer, open_folder(DEMO).config.vocab_size)
    assert 4096 <= tokenizer.vocab_size <= 8192


def test_its_default_sampling_does_not_loop():
    model, tokenizer = load("demo")
    defaults = open_folder(DEMO).generation_defaults
    for seed in range(3):
        sampling = Sampling.from_defaults(defaults, {"max_tokens": 120, "seed": seed})
        assert sampling.temp > 0
        words = generate(model, tokenizer, PROMPT, sampling).split()
        assert len(words) > 40
        triples = list(zip(words, words[1:], words[2:], strict=False))
        assert len(set(triples)) > 0.8 * len(triples)


def test_pytorch_generates_the_golden_text():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from converters.reference import ReferenceOpenELM

    folder = open_folder(DEMO)
    model = ReferenceOpenELM(folder.config)
    import mlx.core as mx

    state = {
        name.removeprefix("transformer."): torch.from_numpy(
            np.array(array.astype(mx.float32))
        )
        for name, array in folder.read().items()
    }
    model.load_state_dict(state)
    ids = tokenizer.encode(PROMPT)
    with torch.inference_mode():
        for _ in range(TEXT_TOKENS):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.decode(ids) == (GOLDEN / "demo.txt").read_text()


@pytest.mark.proof
def test_its_score_is_that_of_its_card(shared):
    model, tokenizer = load("demo")
    texts = shared / "data" / "stories" / "text"
    score = evaluate(
        model,
        tokenizer,
        text=[
            texts / "lang-lilac-fairy-book.txt",
            texts / "macdonald-princess-and-curdie.txt",
        ],
        window=256,
    )
    assert score.bits_per_byte <= 1.40
    published = re.search(r"([\d.]+) bits per byte", (DEMO / "README.md").read_text())
    assert published
    assert score.bits_per_byte == pytest.approx(float(published[1]), abs=6e-4)
