"""Generation with the operations and steps for a GPU, forced on the CPU."""

import json
import os
import subprocess
import sys

import mlx.core as mx
import pytest
from engines import Answers, ask, make_engine, make_ids
from models import EVEN, UNEVEN, build

from mlx_openelm.device import FORCED_PATH
from mlx_openelm.generation.cache import KVCache
from mlx_openelm.generation.compact_caches import QuantizedKVCache, SlidingKVCache
from mlx_openelm.generation.decoding import Context, draw_tokens
from mlx_openelm.generation.drafters import LookupDrafter, ModelDrafter
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.speculation import draw_speculatively
from mlx_openelm.generation.step import (
    compiled_batch_step,
    compiled_step,
    plain_batch_step,
    plain_step,
)
from mlx_openelm.tuning import Tuning

PROMPT = [1, 40, 7, 19, 40, 7]


@pytest.fixture(params=["cpu", "gpu"])
def path(request, monkeypatch):
    if request.param == "gpu":
        monkeypatch.setenv(FORCED_PATH, "1")
    return request.param


def ids(tokens):
    return [token.id for token in tokens]


def uncached(model, count):
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(int(model(mx.array([tokens]))[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def test_greedy_tokens_are_those_without_a_cache(path):
    model = build(UNEVEN)
    assert ids(draw_tokens(model, PROMPT, Sampling(), 20)) == uncached(model, 20)


@pytest.mark.parametrize("make_drafter", [LookupDrafter, None])
def test_drafts_change_no_token(path, make_drafter):
    model = build(UNEVEN)
    drafter = make_drafter(4) if make_drafter else ModelDrafter(build(UNEVEN, seed=1))
    drawn = draw_speculatively(model, PROMPT, Sampling(), 30, drafter)
    assert ids(drawn) == ids(draw_tokens(model, PROMPT, Sampling(), 30))


def test_the_answers_of_an_engine_are_those_of_single_texts(path):
    requests = [ask(make_ids(n, seed=n), Sampling(max_tokens=40)) for n in (1, 5, 300)]
    answers = Answers(make_engine())
    answers.add(*requests[:2])
    for _ in range(5):
        answers.step()
    answers.add(requests[2])  # the batch grows while it is decoded
    answers.run()
    for request in requests:
        assert (
            answers.tokens(request)
            == ids(
                draw_tokens(answers.engine._models[""], request.ids, Sampling(), 40)
            )[: len(answers.tokens(request))]
        )


@pytest.mark.parametrize(
    "make_cache", [lambda: QuantizedKVCache(8, 32), lambda: SlidingKVCache(12)]
)
def test_compact_caches_give_the_tokens_of_the_cpu(monkeypatch, make_cache):
    model, drawn = build(EVEN), []
    for variable in (False, True):
        if variable:
            monkeypatch.setenv(FORCED_PATH, "1")
        context = Context(model, make_cache, Tuning(prefill_chunk=4))
        drawn.append(ids(draw_tokens(model, PROMPT, Sampling(), 30, context=context)))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_the_compiled_step_of_several_tokens_is_that_of_the_plain_one(count):
    model, outputs = build(UNEVEN), []
    for make_step in (plain_step, compiled_step):
        cache, step = [KVCache() for _ in model.layers], make_step(model)
        model(mx.array([PROMPT]), cache)
        first = step(mx.arange(3, 3 + count), cache)
        for layer in cache:  # some tokens are rejected
            layer.trim(count - 1)
        outputs.append((first, step(mx.array([9]), cache), cache[0].offset))
    (first, second, offset), (own, other, own_offset) = outputs
    assert offset == own_offset == len(PROMPT) + 2
    assert first.shape == own.shape == (count, 300)
    assert mx.abs(first - own).max() < 1e-4
    assert mx.abs(second - other).max() < 1e-4


CHECK = """
import json
import mlx.core as mx
from engines import Answers, ask, make_engine, make_ids
from models import UNEVEN, build
from trainings import make_recipe, make_samples, make_training
from mlx_openelm.generation.drafters import LookupDrafter
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.speculation import draw_speculatively
from mlx_openelm.signals import Stop
from mlx_openelm.training.arrays import trained_tensors
requests = [ask(make_ids(n, seed=n), Sampling(max_tokens=8)) for n in (1, 5, 40)]
answers = Answers(make_engine())
answers.add(*requests)
answers.run()
drawn = draw_speculatively(
    build(UNEVEN), [1, 40, 7, 19, 40, 7], Sampling(), 20, LookupDrafter(4)
)
tokens = [answers.tokens(r) for r in requests] + [[token.id for token in drawn]]
training = make_training(make_recipe(num_layers=1, dropout=0.1), make_samples())
for _ in range(3):
    training.trainer.update(Stop())
weights = [float(mx.abs(a).sum()) for a in trained_tensors(training.model).values()]
print(json.dumps([tokens, weights]))
"""


@pytest.mark.proof
def test_compiled_steps_and_updates_are_those_without_compilation():
    found = []
    for disabled in ({"MLX_DISABLE_COMPILE": "1"}, {}):
        environment = {**os.environ, FORCED_PATH: "1"}
        environment.pop("MLX_DISABLE_COMPILE", None)
        support = os.path.join(os.path.dirname(__file__), "..", "support")
        environment["PYTHONPATH"] = os.pathsep.join(
            [support, environment.get("PYTHONPATH", "")]
        )
        result = subprocess.run(
            [sys.executable, "-c", CHECK],
            env=environment | disabled,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout))
    (tokens, weights), (own_tokens, own_weights) = found
    assert own_tokens == tokens
    assert own_weights == pytest.approx(weights, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_compiled_step_of_a_batch_is_that_of_the_plain_one(rows):
    from mlx_openelm.generation.cache import SlotCache

    model, outputs = build(UNEVEN), []
    lengths = [3, 7, 5][:rows]
    for make_step in (plain_batch_step, compiled_batch_step):
        cache = [SlotCache() for _ in model.layers]
        for row, length in enumerate(lengths):
            own = [KVCache() for _ in model.layers]
            model(mx.arange(5, 5 + length)[None], own)
            for layer, filled in zip(cache, own, strict=True):
                layer.put(row, *filled.stored())
        step, logits = make_step(model), []
        for place in range(2):
            for layer in cache:
                layer.rows, layer.reach = mx.arange(rows), 32
                layer.offset = mx.array([length + place for length in lengths])
            logits.append(step(mx.array([9, 8, 7][:rows]), cache))
        outputs.append(mx.stack(logits))
    assert outputs[0].shape == (2, rows, 300)
    assert mx.abs(outputs[0] - outputs[1]).max() < 1e-4
