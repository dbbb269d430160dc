"""How a decode step is queued: the same tokens, and no copies of the KV cache."""

from dataclasses import replace

import mlx.core as mx
import pytest
from engines import NEVER, Answers, ask, make_engine, make_ids
from models import UNEVEN, build

from mlx_openelm.generation.cache import KVCache
from mlx_openelm.generation.decoding import Context, draw_tokens
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.step import plain_step, queued
from mlx_openelm.tuning import AHEAD, DEFAULT, ONE_BY_ONE, QUEUES, STAGED, Tuning

K, S, H = 8, 2**14, 64


class OneLayer:
    """A model of one layer with so few operations that a step is queued whole."""

    def __init__(self):
        self.config = replace(UNEVEN, max_context_length=2 * S)
        self.layers = [None]
        self._table = mx.random.normal((300, K * H), key=mx.random.key(0))

    def transformer(self, tokens, cache):
        x = self._table[tokens].reshape(1, K, -1, H)
        keys, values = cache[0].update_and_fetch(x, 2 * x)
        weights = mx.softmax(x @ keys.swapaxes(-1, -2), axis=-1)
        return (weights @ values).reshape(1, -1, K * H)

    def head(self, hidden):
        return hidden @ self._table.T


def extra_bytes(queue: str, monkeypatch) -> list[int]:
    """Return the peak memory of some steps beyond their KV cache."""
    monkeypatch.setattr(KVCache, "step", S)
    mx.clear_cache()
    before = mx.get_active_memory()  # what other tests keep
    model, count = OneLayer(), S - 100
    context = Context(model, tuning=Tuning(queue=queue))
    zeros = mx.zeros((1, K, count, H))
    context.cache[0].append(zeros, zeros)
    mx.eval(context.cache[0].state)
    context.tokens = [1] * count
    del zeros
    tokens = draw_tokens(
        model,
        [1] * count + [5],
        Sampling(),
        60,
        context=context,
        step=plain_step(model),
    )
    for _ in range(3):
        next(tokens)
    peaks = []
    for _ in range(40):
        mx.clear_cache()
        mx.reset_peak_memory()
        next(tokens)
        peaks.append(mx.get_peak_memory())
    stored = sum(array.nbytes for array in context.cache[0].state)
    assert stored == 2 * 4 * K * S * H
    return [peak - stored - before for peak in peaks]


@pytest.mark.parametrize("queue", [STAGED, ONE_BY_ONE])
def test_a_step_that_is_not_queued_whole_copies_no_cache(monkeypatch, queue):
    # On a busy machine the end of a step may still hold the cache: repeat.
    assert any(max(extra_bytes(queue, monkeypatch)) < 8e6 for _ in range(3))


def test_a_step_that_is_queued_whole_copies_the_cache(monkeypatch):
    # Unless the step before it ends too soon, on a busy machine.
    assert max(extra_bytes(AHEAD, monkeypatch)) > 30e6


# The tokens ----------------------------------------------------------------------


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_tokens_do_not_depend_on_the_queue(queue, penalty):
    model, prompt = build(UNEVEN), [1, 40, 7, 19]
    sampling = Sampling(repetition_penalty=penalty, logprobs=2)
    expected = list(draw_tokens(model, prompt, sampling, 20))
    context = Context(model, tuning=Tuning(queue=queue))
    assert list(draw_tokens(model, prompt, sampling, 20, context=context)) == expected


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_the_answers_of_an_engine_do_not_depend_on_the_queue(queue, temp):
    sampling = Sampling(max_tokens=20, temp=temp, logit_bias=NEVER)
    texts = []
    for tuning in (DEFAULT, Tuning(queue=queue)):
        requests = [ask(make_ids(n, seed=n), sampling) for n in (3, 9, 40)]
        answers = Answers(make_engine(tuning=tuning))
        answers.add(*requests)
        answers.run()
        texts.append([answers.tokens(request) for request in requests])
    assert texts[0] == texts[1]


def test_the_newest_keys_are_those_of_the_last_token():
    cache = KVCache()
    keys, values = (mx.random.normal((1, 1, 5, 16)) for _ in range(2))
    cache.append(keys[:, :, :4], values[:, :, :4])
    assert cache.newest == ()
    cache.append(keys[:, :, 4:], values[:, :, 4:])
    assert all(map(mx.array_equal, cache.newest, (keys[:, :, 4:], values[:, :, 4:])))
    pair = mx.stack([keys[:, :, :1], values[:, :, :1]])
    cache.update_pair(pair)
    assert mx.array_equal(*cache.newest, pair)


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        (AHEAD, ["results", "read"]),
        (STAGED, ["newest", "read", "results"]),
        (ONE_BY_ONE, ["read", "results"]),
    ],
)
def test_what_is_handed_over_before_a_token_is_read(monkeypatch, queue, expected):
    cache, results = KVCache(), (mx.array(1.0), mx.array(2.0))
    cache.append(mx.zeros((1, 1, 1, 4)), mx.ones((1, 1, 1, 4)))
    named = {id(a): "results" for a in results}
    named |= {id(a): "newest" for a in cache.newest}
    order = []

    def queue_arrays(*arrays):
        names = {named[id(array)] for array in arrays}
        assert len(names) == 1
        order.extend(names)

    monkeypatch.setattr(mx, "async_eval", queue_arrays)
    with queued(results, [cache], queue):
        order.append("read")
    assert order == expected
