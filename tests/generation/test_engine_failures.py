"""A request of the engine that fails ends alone."""

import pytest
from engines import (
    LONG,
    NEVER,
    POISON,
    Answers,
    Failing,
    Poisoned,
    ask,
    assert_as_alone,
    make_engine,
    make_ids,
)

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.batching import prompts as batch_prompts
from mlx_openelm.generation.batching.rows import DecodeRows
from mlx_openelm.generation.cache import SlotCache
from mlx_openelm.generation.options import Sampling
from mlx_openelm.text.tokenizer import StreamDecoder

MEDIUM = Sampling(max_tokens=25, logit_bias=NEVER)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(batch_prompts, "PREFILL_CHUNK", 40)


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


def test_a_constraint_and_a_draw_fail_in_the_same_step():
    def keys(position):
        if position == 2:
            raise ZeroDivisionError("no key")
        return [position, 0]

    stuck = ask([1, 5], MEDIUM, constraint=Failing("allowed", 2, OpenELMError("")))
    failing = ask([1, 6], Sampling(max_tokens=25, temp=1.0, logit_bias=NEVER))
    object.__setattr__(failing, "keys", keys)
    answers = Answers(make_engine())
    innocent = others()
    answers.add(stuck, failing, *innocent)
    check(answers, [failing], "no key", others=innocent)
    assert isinstance(answers.end(stuck).error, OpenELMError)
    assert len(answers.tokens(stuck)) == len(answers.tokens(failing)) == 2


def test_a_token_that_cannot_be_decoded_ends_its_own_request(monkeypatch):
    decode = StreamDecoder.add

    def fail(self, token):
        if token == POISON:
            raise IndexError("no piece")
        return decode(self, token)

    monkeypatch.setattr(StreamDecoder, "add", fail)
    bias = ((POISON, 1e6),)
    failing = [ask(make_ids(9), Sampling(logit_bias=bias)) for _ in range(2)]
    answers = Answers(make_engine())
    innocent = others()
    answers.add(failing[0], *innocent, failing[1])
    check(answers, failing, "IndexError: no piece", others=innocent)


def test_requests_survive_a_row_that_cannot_be_moved(monkeypatch):
    move = SlotCache.move
    errors = [MemoryError("no memory")]

    def fail(self, *arguments):
        if errors:
            raise errors.pop()
        move(self, *arguments)

    monkeypatch.setattr(SlotCache, "move", fail)
    answers = Answers(make_engine())
    innocent = others()
    cancelled = answers.add(ask(make_ids(9), LONG), *innocent)
    for _ in range(4):
        answers.step()
    answers.engine.cancel([cancelled])
    assert not errors
    check(answers, [], "", others=innocent)


@pytest.mark.parametrize("length", [1, 50])
def test_a_prompt_is_scored_once_in_spite_of_failures(length):
    sampling = Sampling(max_tokens=25, logit_bias=NEVER, logprobs=2)
    scored = ask(make_ids(length), sampling, scores_prompt=True)
    poison = ask([1, POISON], MEDIUM)
    answers = Answers(make_engine({"": Poisoned()}))
    answers.add(scored)
    while len(answers.tokens(scored)) < 3:
        answers.step()
    answers.add(poison)
    check(answers, [poison], "poison", others=[scored])
    first, *later = answers.outputs[scored]
    assert [token.id for token in first.prompt_tokens] == list(scored.ids[1:])
    assert not any(output.prompt_tokens for output in later)
