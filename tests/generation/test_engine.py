"""The engine without HTTP: the answers of requests that join and leave."""

import time
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from engines import (
    CONTEXT,
    EOS,
    LONG,
    NEVER,
    Answers,
    answer,
    ask,
    assert_as_alone,
    make_engine,
    make_ids,
    model,
    tokenizer,
)
from models import build

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.batching import prompts as batch_prompts
from mlx_openelm.generation.batching.prefix_tree import PrefixLimits
from mlx_openelm.generation.batching.sequences import BatchRequest, seeded_keys
from mlx_openelm.generation.constraints import GrammarCompiler
from mlx_openelm.generation.options import Sampling


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(batch_prompts, "PREFILL_CHUNK", 40)


# The same answers ----------------------------------------------------------------


def test_answers_equal_those_alone_in_a_batch_of_32():
    options = [
        Sampling(max_tokens=12),
        Sampling(max_tokens=12, logprobs=3),
        Sampling(max_tokens=9, repetition_penalty=1.5, repetition_context=6),
        Sampling(max_tokens=12, presence_penalty=1.2, frequency_penalty=0.4),
        Sampling(max_tokens=12, no_repeat_ngram=2),
        Sampling(max_tokens=30, stop=("e", "th", " a")),
        Sampling(max_tokens=12, min_tokens=5, logit_bias=((EOS, 9.0),)),
        Sampling(max_tokens=40, stop_loops=3),
    ]
    requests = [
        ask(make_ids(1 + 7 * n % 150, seed=n), options[n % len(options)])
        for n in range(32)
    ]
    answers = answer(*requests)
    for request in requests:
        assert_as_alone(answers, request)


def test_answers_do_not_depend_on_shared_prefixes():
    start = make_ids(90, seed=1)
    continued = [*start, *make_ids(30, seed=2)]
    requests = [
        ask([*start[:80], *make_ids(20, seed=3)]),
        *(ask(continued), ask([*continued, 7])),
        *(ask(start), ask(start[:60]), ask(start)),
        ask([*start[:33], *make_ids(9, seed=4)]),
    ]
    answers = Answers(make_engine())
    for request in requests:  # one after another, each with the prefixes before it
        answers.add(request)
        answers.run()
    shared = [answers.end(request).cached_tokens for request in requests]
    assert shared == [0, 80, 120, 89, 59, 89, 33]
    together = answer(*map(replace, requests))
    for request in requests:
        assert_as_alone(answers, request)
    for request in together.outputs:
        assert_as_alone(together, request)
    assert sum(together.end(r).cached_tokens > 0 for r in together.outputs) >= 4


def test_an_answer_is_a_prefix_of_the_next_prompt():
    answers = Answers(make_engine())
    first = answers.add(ask(make_ids(40), Sampling(max_tokens=20, logit_bias=NEVER)))
    answers.run()
    ids = [*first.ids, *answers.tokens(first), 9, 10]
    second = answers.add(ask(ids))
    answers.run()
    assert answers.end(second).cached_tokens >= len(ids) - 4
    assert_as_alone(answers, second)


@pytest.mark.parametrize("seed", [0, 11, 2**64 - 1])
def test_a_seed_gives_the_tokens_of_stream(seed):
    sampling = Sampling(max_tokens=20, temp=1.3, top_p=0.9, top_k=40, seed=seed)
    requests = [
        BatchRequest(make_ids(9), sampling, seeded_keys(seed), draws_as_alone=True)
        for _ in range(3)
    ]
    others = [ask(make_ids(20, seed=n), replace(sampling, seed=n)) for n in range(3)]
    answers = answer(*requests, *others)
    for request in requests:
        assert_as_alone(answers, request)


def test_log_probabilities_are_the_models():
    request = ask(make_ids(50), Sampling(max_tokens=6, logprobs=4, temp=1.0))
    answers = answer(request, *(ask(make_ids(9, seed=n)) for n in range(4)))
    ids = list(request.ids)
    for output in answers.outputs[request]:
        logits = model(mx.array([ids]))[0, -1]
        expected = np.array(logits - mx.logsumexp(logits))
        assert output.token.logprob == pytest.approx(expected[output.token.id], 1e-4)
        best = np.argsort(-expected)[:4]
        assert [token for token, _ in output.token.alternatives] == best.tolist()
        ids.append(output.token.id)


@pytest.mark.parametrize("length", [1, 2, 39, 41, 130])
@pytest.mark.parametrize("generates", [True, False])
def test_scores_of_a_prompt_are_the_models(length, generates):
    ids = make_ids(length)
    request = ask(
        ids, Sampling(max_tokens=3, logprobs=2), scores_prompt=True, generates=generates
    )
    answers = answer(ask(make_ids(150)), request)
    scored = answers.outputs[request][0].prompt_tokens
    assert [token.id for token in scored] == ids[1:]
    logits = model(mx.array([ids]))[0]
    expected = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    for place, token in enumerate(scored):
        assert token.logprob == pytest.approx(expected[place, token.id], abs=1e-4)
        assert token.alternatives[0][0] == expected[place].argmax()
    assert len(answers.tokens(request)) == (3 if generates else 0)
    assert answers.end(request).finish_reason == "length"
    assert all(not output.prompt_tokens for output in answers.outputs[request][1:])


# Joining and leaving -------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 50, 200])
@pytest.mark.parametrize("steps", range(5))
def test_cancelling_frees_the_row_at_once(length, steps):
    answers = Answers(make_engine(answers=2))
    first, second = ask(make_ids(length), LONG), ask(make_ids(9, seed=2), LONG)
    answers.add(first, second)
    for _ in range(steps):
        answers.step()
    third = answers.add(ask(make_ids(5, seed=3)))
    answers.engine.cancel([first, ask([1])])  # the other is unknown
    assert answers.engine.decoding + answers.engine.waiting == 2
    answers.run_until(third)
    answers.engine.cancel([second])
    assert answers.engine.is_idle
    assert_as_alone(answers, third)


@pytest.mark.parametrize("count", [1, 3])
def test_prompts_of_one_token_can_be_cancelled_before_their_first_step(count):
    answers = Answers(make_engine())
    requests = [ask([7]) for _ in range(count)]
    answers.add(*requests)
    answers.step()
    assert answers.engine.decoding == count
    answers.engine.cancel(requests)
    assert answers.engine.is_idle
    again = answers.add(ask([7]))
    answers.run()
    assert_as_alone(answers, again)


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("gone", range(3))
def test_one_of_several_prompts_of_one_token_is_cancelled_before_its_step(
    before, gone, caplog
):
    answers = Answers(make_engine())
    sampling = Sampling(max_tokens=20, logit_bias=NEVER)
    earlier = [ask(make_ids(9), sampling) for _ in range(before)]
    for request in earlier:
        answers.add(request)
        answers.step()
    requests = [ask([7], sampling) for _ in range(3)]  # more rows than the cache has
    answers.add(*requests)
    while answers.engine.waiting:
        answers.step()
    answers.engine.cancel([requests.pop(gone)])
    answers.run()
    assert not caplog.records  # else the rows were processed again
    for request in earlier + requests:
        assert_as_alone(answers, request)


def test_a_short_request_is_answered_before_long_prompts():
    answers = Answers(make_engine())
    long_ones = [ask(make_ids(500, seed=n)) for n in range(6)]
    answers.add(*long_ones)
    for _ in range(3):
        answers.step()
    short = answers.add(ask(make_ids(10, seed=9)))
    for _ in range(12):  # not the 75 chunks of the long ones
        answers.step()
    assert answers.order == [short]
    assert_as_alone(answers, short)


def test_a_step_reads_one_chunk(monkeypatch):
    # So that requests that come or are cancelled meanwhile are seen.
    read = []
    call = type(model.transformer).__call__

    def record(self, tokens, *rest, **options):
        read.append(tokens.shape[1])
        return call(self, tokens, *rest, **options)

    monkeypatch.setattr(type(model.transformer), "__call__", record)
    answers = Answers(make_engine())
    answers.add(*(ask(make_ids(500, seed=n)) for n in range(3)))
    for count in range(1, 8):
        answers.step()
        assert read == [40] * count


def test_long_prompts_progress_among_short_ones():
    answers = Answers(make_engine(answers=4))
    long_one = answers.add(ask(make_ids(500)))
    for n in range(60):
        answers.add(ask(make_ids(10, seed=n)))
        answers.step()
        if long_one in answers.order:
            return
    raise AssertionError("the long prompt has waited for all short ones")


def test_answers_in_progress_are_not_held_up_by_prompts():
    answers = Answers(make_engine())
    first = answers.add(ask(make_ids(5), LONG))
    answers.step()
    answers.step()
    answers.add(*(ask(make_ids(500, seed=n)) for n in range(3)))
    for _ in range(20):
        before = len(answers.outputs[first])
        answers.step()
        assert len(answers.outputs[first]) == before + 1


def test_the_engine_is_idle_only_without_requests():
    engine = make_engine()
    assert engine.is_idle
    engine.add(ask(make_ids(3)))
    assert (engine.waiting, engine.decoding, engine.is_idle) == (1, 0, False)
    engine.step()
    assert (engine.waiting, engine.decoding, engine.is_idle) == (0, 1, False)


# Deadlines and constraints -------------------------------------------------------


def test_a_request_fails_at_its_deadline_and_others_continue():
    answers = Answers(make_engine(answers=2))
    soon = time.monotonic() + 0.05
    late = [ask(make_ids(n, seed=n), LONG, deadline=soon) for n in (1, 60, 300, 9)]
    other = ask(make_ids(8), Sampling(max_tokens=100, logit_bias=NEVER))
    answers.add(other, *late)
    answers.step()
    time.sleep(0.06)
    answers.run()
    for request in late:
        assert "deadline" in str(answers.end(request).error)
    assert_as_alone(answers, other)


def test_constrained_and_free_rows_share_a_batch():
    compiler = GrammarCompiler(tokenizer, model.config.vocab_size)
    digits = compiler.regex("[0-9]{3,5}x")
    requests = [
        ask(
            make_ids(9, seed=n),
            Sampling(max_tokens=20, temp=n % 2),
            constraint=digits.copy() if n % 3 else None,
        )
        for n in range(9)
    ]
    answers = answer(*requests)
    for n, request in enumerate(requests):
        if n % 3:
            text = answers.text(request).removesuffix("x")
            assert text.isdecimal()
            assert 3 <= len(text) <= 5
            assert answers.end(request).finish_reason == "stop"
        elif n % 2 == 0:
            assert_as_alone(answers, request)


# Prefixes that are kept ----------------------------------------------------------


def test_prefixes_belong_to_one_model():
    other = build(model.config, seed=9)
    answers = Answers(make_engine({"a": model, "b": other}))
    requests = [ask(make_ids(90), model=name) for name in "abab"]
    for request in requests:
        answers.add(request)
        answers.run()
    cached = [answers.end(request).cached_tokens for request in requests]
    assert cached == [0, 0, 89, 89]
    for request, own_model in zip(requests, (model, other) * 2, strict=True):
        assert_as_alone(answers, request, own_model)


def test_several_models_answer_together():
    models = {str(n): build(model.config, seed=n) for n in range(3)}
    requests = [ask(make_ids(20, seed=n), model=str(n % 3)) for n in range(9)]
    answers = Answers(make_engine(models, answers=4))
    answers.add(*requests)
    answers.run()
    for request in requests:
        assert_as_alone(answers, request, models[request.model])


def test_nothing_is_kept_where_the_limits_are_zero():
    for kept in (PrefixLimits(prompts=0), PrefixLimits(bytes=0)):
        answers = Answers(make_engine(kept=kept))
        for _ in range(2):
            request = answers.add(ask(make_ids(90)))
            answers.run()
            assert answers.end(request).cached_tokens == 0
            assert answers.engine.kept_bytes == 0
            assert_as_alone(answers, request)


def test_a_wrong_prompt_is_refused_when_it_is_added():
    engine = make_engine()
    for ids in ([], [300], [5] * CONTEXT):
        with pytest.raises(OpenELMError):
            engine.add(ask(ids))
    assert engine.is_idle


def test_a_prompt_whose_prefix_is_kept_counts_as_short():
    kept = make_ids(400)
    answers = Answers(make_engine(prompts=2))
    answers.add(ask(kept))
    answers.run()
    others = [ask(make_ids(450, seed=n), LONG) for n in range(1, 4)]
    answers.add(*others)
    answers.step()
    again = answers.add(ask([*kept, 7, 8, 9]))
    answers.run_until(again, most_steps=12)
    assert answers.outputs[again][-1].cached_tokens >= 399
    assert not any(answers.outputs[other] for other in others[2:])


def test_a_prompt_that_cannot_be_kept_is_answered(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    answers = Answers(make_engine())
    request = answers.add(ask(make_ids(3)))
    answers.step()
    monkeypatch.setattr(answers.engine._tree, "insert", fail)
    answers.run()
    assert answers.outputs[request][-1].finish_reason == "length"
