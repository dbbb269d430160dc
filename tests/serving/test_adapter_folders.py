"""Adapters of every kind, loaded from folders as `serve --adapter` loads them."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import pytest
from models import UNEVEN, small_tokenizer, weights_of
from models import write_hugging_face as write_model
from servers import CONTEXT, post, serving

from mlx_openelm.finetuning.preparation import make_trainable
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import generate
from mlx_openelm.storage.adapter_folder import AdapterConfig, write_adapter
from mlx_openelm.storage.loading import add_adapter, load
from mlx_openelm.storage.tokenizer_finder import write_tokenizer
from mlx_openelm.training.arrays import trained_tensors

KINDS = {
    "lora": {},
    "embedding": {"adapt_embedding": True},
    "dora": {"fine_tune_type": "dora"},
    "dora-embedding": {"fine_tune_type": "dora", "adapt_embedding": True},
    "full": {"fine_tune_type": "full"},
}
PROMPTS = ("The king", "The king and his wolf", "x" * 60, "The king")


def write_random_adapter(folder, base, options, dtype=mx.float32):
    """Write what `lora` writes, with random factors."""
    model, _ = load(str(base))
    recipe = FinetuneRecipe(data="-", rank=4, scale=2.0, **options)
    make_trainable(model, recipe)
    mx.random.seed(sum(folder.name.encode()))
    tensors = {
        name: (array + 0.1 * mx.random.normal(array.shape)).astype(dtype)
        for name, array in trained_tensors(model).items()
    }
    keys = {name.rpartition(".")[0] for name in tensors}
    config = AdapterConfig(
        recipe.fine_tune_type, len(UNEVEN.ffn_dims), tuple(sorted(keys)), 4, 2.0
    )
    folder.mkdir()
    write_adapter(folder, config, tensors)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = replace(UNEVEN, max_context_length=CONTEXT)
    folder = tmp_path_factory.mktemp("models") / "base"
    write_model(folder, config, weights_of(config, 4))
    write_tokenizer(small_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def folders(base):
    written = {
        name: write_random_adapter(base.parent / name, base, options)
        for name, options in KINDS.items()
    }
    path = base.parent / "bfloat16"
    written["bfloat16"] = write_random_adapter(
        path, base, KINDS["embedding"], mx.bfloat16
    )
    return written


@pytest.fixture(scope="module")
def server(base, folders):
    model, tokenizer = load(str(base))
    adapters = {name: add_adapter(model, path)[0] for name, path in folders.items()}
    with serving(model, tokenizer, adapters=adapters) as started:
        yield started


def test_answers_are_those_of_generate_with_the_adapter(server, base, folders):
    """In batches of all models, and again with prompts that are kept."""
    expected = {}
    for name, path in {"tiny": None, **folders}.items():
        model, tokenizer = load(str(base), path)
        for prompt in PROMPTS:
            answer = generate(
                model, tokenizer, prompt, Sampling(max_tokens=8), template="raw"
            )
            expected[name, prompt] = answer
    assert len({expected[name, PROMPTS[0]] for name, _ in expected}) == 1 + len(folders)
    jobs = [(name, prompt) for prompt in PROMPTS for name in ("tiny", *folders)]

    def ask(job):
        name, prompt = job
        body = {"model": name, "prompt": prompt, "max_tokens": 8}
        status, answer = post(server.url, body)
        return answer["choices"][0]["text"] if status == 200 else json.dumps(answer)

    for _ in range(2):
        with ThreadPoolExecutor(8) as executor:
            answers = dict(zip(jobs, executor.map(ask, jobs), strict=True))
        assert answers == expected
