import itertools
import random
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from models import UNEVEN, build, small_tokenizer

import mlx_openelm
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.batching import prompts as batch_prompts
from mlx_openelm.generation.batching.answering import BatchPrompt, answer_together
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import stream

tokenizer = small_tokenizer()
model = build(UNEVEN)
EOS = tokenizer.eos_id
SOMETIMES = ((EOS, 2.0),)  # some answers end immediately, others at the limit


def make_prompts(count, *, seed=0, longest=50, vocabulary=300):
    chance = random.Random(seed)
    return [
        BatchPrompt(n, [1, *chance.choices(range(3, vocabulary), k=k)])
        for n in range(count)
        for k in [min(int(chance.expovariate(0.1)), longest)]
    ]


def alone(prompt, sampling, model=model, tokenizer=tokenizer):
    return list(stream(model, tokenizer, prompt.ids, sampling))


def together(prompts, sampling, batch_size=16, **options):
    answered = list(
        answer_together(
            model, tokenizer, prompts, sampling, batch_size=batch_size, **options
        )
    )
    assert len(answered) == len(prompts)
    return {a.prompt.number: a for a in answered}


def assert_same(answered, pieces):
    assert [t.id for t in answered.drawn] == [p.token for p in pieces]
    assert answered.tokens == tuple(p.token for p in pieces if p.token != EOS)
    assert answered.text == "".join(p.text for p in pieces)
    assert answered.finish_reason == pieces[-1].finish_reason
    for token, piece in zip(answered.drawn, pieces, strict=True):
        assert token.logprob == pytest.approx(piece.logprob, abs=1e-4)
        assert [t for t, _ in token.alternatives] == [t for t, _ in piece.top_logprobs]


CONTROLS = {
    "plain": Sampling(max_tokens=20),
    "EOS": Sampling(max_tokens=20, logit_bias=SOMETIMES),
    "to the end of the context": Sampling(max_tokens=99, logit_bias=SOMETIMES),
    "one token": Sampling(max_tokens=1),
    "stop texts": Sampling(max_tokens=20, stop=("e", "th", "on", " a"), stop_loops=3),
    "penalty": Sampling(max_tokens=12, repetition_penalty=1.7, repetition_context=5),
    "no n-gram": Sampling(max_tokens=12, no_repeat_ngram=2, logit_bias=SOMETIMES),
    "min_tokens": Sampling(max_tokens=12, min_tokens=4, logit_bias=((EOS, 9.0),)),
    "logprobs": Sampling(max_tokens=8, logprobs=3, logit_bias=SOMETIMES),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_batched_answers_equal_those_of_single_prompts(name):
    sampling = CONTROLS[name]
    prompts = make_prompts(30, seed=len(name))
    expected = {q.number: alone(q, sampling) for q in prompts}
    ended = Counter(pieces[-1].finish_reason for pieces in expected.values())
    if sampling.logit_bias and not sampling.logprobs:
        assert ended["stop"] > 2
    for batch_size in (3, 16):
        random.Random(batch_size).shuffle(prompts)
        answers = together(prompts, sampling, batch_size)
        for number, pieces in expected.items():
            assert_same(answers[number], pieces)


def test_the_batch_may_be_of_any_size():
    sampling, prompts = CONTROLS["EOS"], make_prompts(20, seed=5)
    expected = {q.number: alone(q, sampling) for q in prompts}
    for batch_size in (1, 2, 7, 64):
        for count in (0, 1, 2, 20):
            answers = together(prompts[:count], sampling, batch_size)
            for number, answered in answers.items():
                assert_same(answered, expected[number])


def test_rows_grow_beyond_their_first_slots(monkeypatch):
    monkeypatch.setattr(batch_prompts, "PREFILL_CHUNK", 37)
    large = build(replace(UNEVEN, max_context_length=700))
    lengths = (250, 1, 255, 256, 257, 2, 520, 64, 600)
    prompts = [BatchPrompt(n, [1, *range(3, k + 2)][:k]) for n, k in enumerate(lengths)]
    prompts = [BatchPrompt(q.number, [i % 300 for i in q.ids]) for q in prompts]
    sampling = Sampling(max_tokens=12)
    for answered in answer_together(large, tokenizer, prompts, sampling, batch_size=4):
        pieces = alone(answered.prompt, sampling, large)
        assert_same(answered, pieces)


def test_the_demo_gives_the_same_answers_in_a_batch():
    demo, words = mlx_openelm.load("demo")
    prompts = make_prompts(12, longest=30, vocabulary=4000)
    sampling = Sampling(max_tokens=16, logprobs=1)
    for answered in answer_together(demo, words, prompts, sampling, batch_size=5):
        assert_same(answered, alone(answered.prompt, sampling, demo, words))


# Rows ------------------------------------------------------------------------------


class Recorder:
    """A model that records how many rows and tokens each call had."""

    def __init__(self):
        self.config, self.layers, self.head = model.config, model.layers, model.head
        self.shapes = []

    def transformer(self, tokens, cache, **layout):
        self.shapes.append(tokens.shape)
        return model.transformer(tokens, cache, **layout)


def record_rows(lengths, batch_size):
    """Return the rows of each step for answers of these lengths, cut by the context."""
    recorder = Recorder()
    context = model.config.max_context_length
    prompts = [BatchPrompt(n, [7] * (context - k)) for n, k in enumerate(lengths)]
    sampling = Sampling(max_tokens=99, logit_bias=((EOS, -100.0),))
    answered = list(
        answer_together(recorder, tokenizer, prompts, sampling, batch_size=batch_size)
    )
    assert sorted(len(a.tokens) for a in answered) == sorted(lengths)
    return [rows for rows, count in recorder.shapes if count == 1]


def test_an_ended_answers_row_is_reused_for_the_next_prompt():
    rows = record_rows([31, *[3] * 8], batch_size=2)
    # One step per answer is queued before its end is detected.
    assert len(rows) == 8 * (3 + 1)
    assert set(rows) == {2}


def test_idle_rows_are_not_computed():
    rows = record_rows([3, 5, 20, 4], batch_size=4)
    assert rows == [4] * 4 + [3] + [2] + [1] * 15


def test_prompts_are_consumed_as_rows_become_free():
    taken = itertools.count()
    prompts = (q for q, _ in zip(make_prompts(40), taken, strict=False))
    sampling = Sampling(max_tokens=3, logit_bias=((EOS, -100.0),))
    answers = answer_together(model, tokenizer, prompts, sampling, batch_size=4)
    next(answers)
    assert next(taken) <= 2 * 4 + 1


def test_answers_are_yielded_when_complete_and_steps_are_reported():
    steps = []
    prompts = [
        BatchPrompt(0, [7] * 30),
        BatchPrompt(1, [7] * 62),
        BatchPrompt(2, [7] * 60),
    ]
    sampling = Sampling(max_tokens=99, logit_bias=((EOS, -100.0),))
    answered = list(
        answer_together(model, tokenizer, prompts, sampling, on_step=steps.append)
    )
    assert [a.prompt.number for a in answered] == [1, 2, 0]
    assert steps == [3] * 2 + [2] * 2 + [1] * 30
    for answer in answered:
        assert answer.time_to_first_token_s > 0
        assert answer.prompt_tps * answer.time_to_first_token_s == pytest.approx(
            len(answer.prompt.ids)
        )
        assert answer.generation_tps > 0


def test_a_prompt_that_fills_the_context_is_refused():
    for ids, words in (
        ([1] * 64, "64 tokens"),
        ([], "empty"),
        ([300], "invalid token id"),
    ):
        with pytest.raises(OpenELMError, match=words):
            together([BatchPrompt(0, [1]), BatchPrompt(1, ids)], Sampling())


# Sampling --------------------------------------------------------------------------


def test_sampled_tokens_depend_on_seed_and_number_only():
    sampling = Sampling(max_tokens=12, temp=1.0, top_p=0.95, seed=3)
    prompts = make_prompts(24, seed=1)
    first = together(prompts, sampling)
    for batch_size in (1, 5):
        random.Random(batch_size).shuffle(prompts)
        again = together(prompts, sampling, batch_size)
        assert {n: a.tokens for n, a in again.items()} == {
            n: a.tokens for n, a in first.items()
        }
    other = together(prompts, replace(sampling, seed=4))
    assert sum(other[n].tokens != first[n].tokens for n in first) > 20
    same = together([BatchPrompt(n, [1, 5]) for n in range(20)], sampling)
    assert len({a.tokens for a in same.values()}) > 15


def test_without_a_seed_every_run_differs():
    sampling = Sampling(max_tokens=12, temp=1.0)
    prompts = make_prompts(8, seed=1)
    mx.random.seed(0)
    first = together(prompts, sampling)
    mx.random.seed(0)
    again = together(prompts, sampling)
    assert any(first[n].tokens != again[n].tokens for n in first)


def test_tokens_are_drawn_from_the_models_distribution():
    sampling = Sampling(max_tokens=2, temp=1.3, top_k=6, seed=0)
    prompt, draws = [1, 9, 30], 1500
    prompts = [BatchPrompt(n, prompt) for n in range(draws)]
    answers = together(prompts, sampling, 250)
    for position in (0, 1):
        context = prompt
        counted = Counter(a.drawn[0].id for a in answers.values())
        if position:
            most, draws = counted.most_common(1)[0]
            context = [*prompt, most]
            counted = Counter(
                a.drawn[1].id for a in answers.values() if a.drawn[0].id == most
            )
        logits = np.array(model(mx.array([context])))[0, -1] / 1.3
        likeliest = np.argsort(-logits)[:6]
        odds = np.exp(logits[likeliest] - logits[likeliest[0]])
        expected = draws * odds / odds.sum()
        counts = np.array([counted[int(i)] for i in likeliest])
        assert counts.sum() == draws
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < 20.5  # 5 degrees of freedom: once in a thousand seeds


def test_each_position_of_an_answer_has_its_own_random_key():
    never = ((EOS, -1e6),)
    sampling = Sampling(max_tokens=30, temp=1e5, seed=0, logit_bias=never)
    prompts = [BatchPrompt(n, [1, 5]) for n in range(20)]
    for answered in together(prompts, sampling).values():
        assert len(set(answered.tokens)) > len(answered.tokens) // 2
