"""The decode loop gives the same tokens with any chunks, steps and contexts."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import UNEVEN, build

from mlx_openelm import openblas
from mlx_openelm.generation import decoding
from mlx_openelm.generation import step as steps
from mlx_openelm.generation.cache import KVCache
from mlx_openelm.generation.decoding import Context, draw_tokens
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.step import compiled_step, plain_step
from mlx_openelm.tuning import DEFAULT

model = build(UNEVEN)
prompts = st.lists(st.integers(3, UNEVEN.vocab_size - 1), min_size=1, max_size=40)


def draw(prompt, count=12, sampling=None, **options):
    drawn = draw_tokens(model, prompt, sampling or Sampling(), count, **options)
    return [token.id for token in drawn]


def uncached(prompt, count):
    """Decode greedily without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.array(model(mx.array([tokens])))[0, -1].argmax()))
    return tokens[len(prompt) :]


@settings(max_examples=60)
@given(prompts, st.integers(1, 8), st.data())
def test_greedy_tokens_do_not_depend_on_chunks_or_the_context(prompt, chunk, data):
    expected = uncached(prompt, 6)
    before = prompt[: data.draw(st.integers(0, len(prompt)))] + data.draw(prompts)
    context = Context(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "PREFILL_CHUNK", chunk)
        assert draw(prompt, 6) == expected
        draw(before[:50], 5, context=context)
        assert draw(prompt, 6, context=context) == expected


def test_a_context_processes_only_new_tokens(monkeypatch):
    read = []
    original = type(model.transformer).__call__

    def count(self, tokens, cache=None, **options):
        read.append(tokens.size)
        return original(self, tokens, cache, **options)

    monkeypatch.setattr(type(model.transformer), "__call__", count)
    context = Context(model)
    first = list(range(3, 23))
    answer = draw(first, 4, context=context)
    assert read == [20, 1, 1, 1]
    assert context.tokens == first + answer[:-1]
    read.clear()
    draw([*first, *answer, 7, 8], 2, context=context)
    assert read == [3, 1]  # the last drawn token, not yet processed, and the two
    read.clear()
    draw(first[:10], 1, context=context)  # its last token is processed again
    assert read == [1]
    assert context.tokens == first[:10]


def test_a_closed_stream_leaves_a_valid_context():
    context = Context(model)
    prompt = list(range(3, 13))
    drawn = draw_tokens(model, prompt, Sampling(), 20, context=context)
    answer = [next(drawn).id for _ in range(3)]
    drawn.close()
    longer = [*prompt, *answer, 9]
    assert draw(longer, 5, context=context) == uncached(longer, 5)


@pytest.mark.parametrize("offset", [3, 5])  # the cache grows inside, or at the end
def test_the_compiled_step_draws_what_the_plain_one_does(monkeypatch, offset):
    monkeypatch.setattr(KVCache, "step", 8)
    prompt = list(range(3, 3 + offset))
    compiled = draw(prompt, 30, step=compiled_step(model))
    assert compiled == draw(prompt, 30, step=plain_step(model)) == uncached(prompt, 30)


def test_on_a_gpu_the_step_is_compiled(monkeypatch):
    chosen = []
    monkeypatch.setattr(steps, "compiled_step", chosen.append)
    for kind, expected in ((mx.DeviceType.cpu, []), (mx.DeviceType.gpu, [model])):
        device = type("Device", (), {"type": kind})
        monkeypatch.setattr(mx, "default_device", device)
        steps.choose_step(model, DEFAULT)
        assert chosen == expected


@pytest.mark.interop
def test_it_draws_the_tokens_of_mlx_lm():
    from mlx_lm.generate import generate_step

    prompt = list(range(3, 30))
    theirs = [t for t, _ in generate_step(mx.array(prompt), model, max_tokens=20)]
    assert draw(prompt, 20) == theirs


def test_logprobs_are_the_models_own():
    prompt = list(range(3, 13))
    sampling = Sampling(logprobs=3, temp=1.0, seed=1)
    tokens = list(draw_tokens(model, prompt, sampling, 5))
    text = list(prompt)
    for token in tokens:
        logits = np.array(model(mx.array([text])))[0, -1].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        assert token.logprob == pytest.approx(logprobs[token.id], abs=1e-4)
        likeliest = np.argsort(-logprobs)[:3]
        assert [i for i, _ in token.alternatives] == likeliest.tolist()
        values = [value for _, value in token.alternatives]
        np.testing.assert_allclose(values, logprobs[likeliest], atol=1e-4)
        text.append(token.id)


def test_controls_see_the_prompt_and_the_answer():
    prompt = [7, 8, 9]
    answer = draw(prompt, 40, Sampling(no_repeat_ngram=1))
    assert len({*prompt, *answer}) == 43
    early = Sampling(min_tokens=10, logit_bias=((2, 100.0),))
    assert [token == 2 for token in draw(prompt, 12, early)] == [False] * 10 + [
        True
    ] * 2


def test_the_thread_limit_of_a_small_model_is_reset(monkeypatch):
    limits = []
    monkeypatch.setattr(openblas, "use_threads", limits.append)
    drawn = draw_tokens(model, [3, 4, 5], Sampling(), 8)
    next(drawn), next(drawn)
    assert limits[-1] == 1
    drawn.close()
    assert limits[-1] is None


def test_an_interrupted_forward_pass_leaves_a_valid_context(monkeypatch):
    context = Context(model)
    prompt = list(range(3, 13))
    drawn = draw_tokens(model, prompt, Sampling(), 20, context=context)
    answer = [next(drawn).id]
    layers = iter([None, KeyboardInterrupt()])  # in the second one
    original = decoding.KVCache.update_and_fetch

    def interrupted(self, keys, values):
        if error := next(layers, None):
            raise error
        return original(self, keys, values)

    with monkeypatch.context() as patch:
        patch.setattr(decoding.KVCache, "update_and_fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(drawn)
    longer = [*prompt, *answer, 9]
    assert draw(longer, 5, context=context) == uncached(longer, 5)


def test_changed_norms_are_used_in_the_next_step():
    changed, cache = build(UNEVEN), [KVCache() for _ in model.layers]
    tokens = mx.array([[1, 2, 3, 4]])
    changed(tokens[:, :2], cache)
    changed(tokens[:, 2:3], cache)
    norm = changed.layers[-1].attn.q_norm
    norm.weight = norm.weight * 2
    fresh = [KVCache() for _ in model.layers]
    changed(tokens[:, :3], fresh)
    step, expected = changed(tokens[:, 3:], cache), changed(tokens[:, 3:], fresh)
    np.testing.assert_allclose(np.array(step), np.array(expected), atol=1e-5)


def test_the_first_token_is_yielded_before_a_step_is_built():
    steps_made = []

    def step(token, cache):
        steps_made.append(token)
        return plain_step(model)(token, cache)

    drawn = draw_tokens(model, [3, 4, 5], Sampling(), 3, step=step)
    next(drawn)
    assert not steps_made
    assert len([*drawn]) == 2
    assert len(steps_made) == 2


def test_a_context_is_reused_after_an_interrupted_step(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    context, prompt = Context(model), [3, 4, 5, 6, 7, 8]
    context.read(model, prompt[:3])
    with monkeypatch.context() as changes:
        changes.setattr(context, "_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            context.extend(model, prompt[3:5])
    assert context.reuse(prompt) == 3
    assert draw(prompt, 5, context=context) == uncached(prompt, 5)
