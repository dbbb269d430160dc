"""A request of the engine that fails ends alone."""

import numpy as np
import pytest
from engines import (
    LONG,
    NEVER,
    Answers,
    ask,
    assert_as_alone,
    make_engine,
    make_ids,
    model,
)

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.batching import prompts as batch_prompts
from mlx_openelm.generation.batching.rows import DecodeRows
from mlx_openelm.generation.options import Sampling

POISON = 299  # a token id

MEDIUM = Sampling(max_tokens=25, logit_bias=NEVER)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(batch_prompts, "PREFILL_CHUNK", 40)


class Poisoned:
    """A model that fails at one token id, or where a batch is too large."""

    def __init__(self, most_rows=99):
        self.config, self.layers, self.head = model.config, model.layers, model.head
        self.most_rows = most_rows

    def transformer(self, tokens, cache, **layout):
        if POISON in tokens.flatten().tolist():
            raise ValueError("poison")
        if tokens.shape[0] > self.most_rows:
            raise MemoryError("too many rows")
        return model.transformer(tokens, cache, **layout)


def others(count=4):
    return [ask(make_ids(5 + 9 * n, seed=n), MEDIUM) for n in range(count)]


def check(answers, failed, reason, *, others):
    answers.run()
    for request in failed:
        error = answers.end(request).error
        assert isinstance(error, OpenELMError)
        assert reason in str(error)
    for request in others:
        assert_as_alone(answers, request)
    assert answers.engine.is_idle


@pytest.mark.parametrize(
    "ids",
    [[1, POISON], [POISON], [1, POISON, 9], [*make_ids(100), POISON, *make_ids(50)]],
    ids=["last", "only", "in a chunk of several", "in a later chunk"],
)
def test_a_failing_forward_pass_ends_its_own_request(ids):
    answers = Answers(make_engine({"": Poisoned()}))
    innocent, poison = others(), ask(ids, MEDIUM)
    answers.add(*innocent[:2], poison, *innocent[2:])
    check(answers, [poison], "ValueError: poison", others=innocent)


def test_requests_survive_one_failure_after_another():
    answers = Answers(make_engine({"": Poisoned()}))
    innocent, poisons = others(), []
    answers.add(*innocent)
    for n in range(12):
        for _ in range(4):
            answers.step()
        poisons.append(answers.add(ask([1, 5 + n, POISON], MEDIUM)))
    check(answers, poisons, "poison", others=innocent)


def test_requests_survive_failures_of_which_none_is_the_cause():
    class Unsteady(Poisoned):
        calls = 0

        def transformer(self, tokens, cache, **layout):
            self.calls += tokens.shape[0] == 4
            if self.calls and self.calls % 5 == 0:
                self.calls += 1
                raise MemoryError("not now")
            return super().transformer(tokens, cache, **layout)

    answers = Answers(make_engine({"": Unsteady()}))
    innocent = others()
    answers.add(*innocent)
    check(answers, [], "", others=innocent)


def test_a_batch_that_is_too_large_ends():
    answers = Answers(make_engine({"": Poisoned(most_rows=2)}))
    requests = others(5)
    answers.add(*requests)
    answers.run()
    ended = [answers.end(request) for request in requests]
    assert all(output.error or output.finish_reason for output in ended)
    assert sum(output.error is None for output in ended) >= 2
    alone = answers.add(ask(make_ids(9), MEDIUM))
    answers.run()
    assert_as_alone(answers, alone)


def test_a_failing_draw_ends_its_own_request():
    def keys(position):
        if position == 3:
            raise ZeroDivisionError("no key")
        return [position, 0]

    sampling = Sampling(max_tokens=25, temp=1.0, logit_bias=NEVER)
    failing = ask(make_ids(9), sampling)
    object.__setattr__(failing, "keys", keys)
    answers = Answers(make_engine())
    innocent = others()
    same_group = ask(make_ids(9, seed=5), sampling)
    answers.add(*innocent, failing, same_group)
    check(answers, [failing], "ZeroDivisionError: no key", others=innocent)
    assert len(answers.tokens(failing)) == 3
    assert len(answers.tokens(same_group)) == 25


class Failing:
    """A constraint that allows all, and fails at a token."""

    def __init__(self, place, step, error):
        self.place, self.step, self.error, self.count = place, step, error, 0

    def allowed(self, vocab_size):
        if self.place == "allowed" and self.count == self.step:
            raise self.error
        return np.ones(vocab_size, np.bool_)

    def accept(self, token):
        self.count += 1
        if self.place == "accept" and self.count == self.step:
            raise self.error


@pytest.mark.parametrize(
    ("place", "step", "error"),
    [
        ("allowed", 1, ValueError("stuck")),
        ("allowed", 4, OpenELMError("stuck")),
        ("accept", 1, OpenELMError("stuck")),
        ("accept", 4, ValueError("stuck")),
    ],
)
def test_a_failing_constraint_ends_its_own_request(place, error, step):
    failing = ask(make_ids(9), MEDIUM, constraint=Failing(place, step, error))
    kept = ask(make_ids(9, seed=8), MEDIUM, constraint=Failing("never", 0, error))
    answers = Answers(make_engine())
    innocent = others()
    answers.add(*innocent, failing, kept)
    check(answers, [failing], "stuck", others=[*innocent, kept])


def test_a_constraint_may_fail_at_the_first_token():
    constraint = Failing("allowed", 0, OpenELMError("stuck"))
    failing = ask([1], MEDIUM, constraint=constraint)
    answers = Answers(make_engine())
    answers.add(failing)
    check(answers, [failing], "stuck", others=[])


def test_a_row_that_cannot_be_given_ends_its_own_request(monkeypatch):
    admit = DecodeRows.admit

    def fail(self, sequences):
        if any(sequence.request.ids[-1] == POISON for sequence in sequences):
            raise MemoryError("no row")
        admit(self, sequences)

    monkeypatch.setattr(DecodeRows, "admit", fail)
    answers = Answers(make_engine())
    innocent, failing = others(), ask([1, POISON], LONG)
    answers.add(*innocent)
    answers.step()
    answers.step()
    answers.add(failing)
    check(answers, [failing], "MemoryError: no row", others=innocent)
