"""The engine under random sequences of requests, cancellations, deadlines, failures."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import pytest
from engines import (
    EOS,
    NEVER,
    POISON,
    Answers,
    Failing,
    Poisoned,
    alone,
    ask,
    make_engine,
    make_ids,
    model,
    tokenizer,
)
from models import build

from mlx_openelm.device import FORCED_PATH
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.batching import prefix_tree, rows, sequences
from mlx_openelm.generation.batching import prompts as batch_prompts
from mlx_openelm.generation.batching.drawing import BatchSampler, DrawnBatch
from mlx_openelm.generation.batching.engine import Engine
from mlx_openelm.generation.batching.prefix_tree import PrefixLimits, PrefixTree
from mlx_openelm.generation.batching.rows import DecodeRows
from mlx_openelm.generation.batching.sequences import DeadlineError, seeded_keys
from mlx_openelm.generation.cache import KVCache, SlotCache
from mlx_openelm.generation.constraints import GrammarCompiler
from mlx_openelm.generation.options import Sampling
from mlx_openelm.tuning import QUEUES, Tuning

FAILURES = (  # calls of a step that can fail, as when memory runs out
    (DecodeRows, "admit"),
    (DecodeRows, "_build_forward"),
    (BatchSampler, "draw"),
    (BatchSampler, "regroup"),
    (DrawnBatch, "read"),
    (DrawnBatch, "queue"),
    (PrefixTree, "insert"),
    (PrefixTree, "fetch"),
    (SlotCache, "put"),
    (SlotCache, "take"),
    (KVCache, "append"),
)
REASONS = ("out of memory", "poison", "stuck")  # of failures that are made

SHORT_CONTEXT = replace(model.config, max_context_length=45)
MODELS = {"": model, "b": build(SHORT_CONTEXT, seed=7)}
compiler = GrammarCompiler(tokenizer, model.config.vocab_size)


def failing_keys(position):
    if position == 2:
        raise ValueError("stuck")
    return [position, 0]


def make_requests() -> Iterator:
    start = make_ids(40, seed=1)
    prompts = [
        *([1], [7], [8], [1, 5], start[:12], start[:13], start, [*start, 9, 8]),
        *([*start[:25], *make_ids(9, seed=2)], make_ids(28, seed=3)),
    ]
    options = [
        Sampling(max_tokens=1),
        Sampling(max_tokens=5, logit_bias=NEVER),
        Sampling(max_tokens=14, logit_bias=NEVER),
        Sampling(max_tokens=9, logprobs=2, repetition_penalty=1.4),
        Sampling(max_tokens=9, no_repeat_ngram=2, min_tokens=4),
        Sampling(max_tokens=9, stop=("e", "th"), logit_bias=NEVER),
        Sampling(max_tokens=9, logit_bias=((EOS, 6.0),)),
    ]
    for n, ids in enumerate(prompts):
        for sampling in options:
            yield ask(ids, sampling)
        yield ask(ids, options[2], model="b")
        yield ask(ids, Sampling(max_tokens=8, temp=0.9, top_p=0.9))
        seeded = Sampling(max_tokens=8, temp=0.9, seed=n)
        yield replace(ask(ids, seeded), keys=seeded_keys(n), draws_as_alone=True)
        scored = replace(options[1], logprobs=2)
        yield ask(ids, scored, scores_prompt=True)
        yield ask(ids, scored, scores_prompt=True, generates=False)
        yield ask(ids, options[2], constraint=compiler.regex("[0-9]{1,6}"))
        yield ask([*ids, POISON], options[1])
        yield ask(
            ids, options[2], constraint=Failing("allowed", 2, ValueError("stuck"))
        )
        yield ask(
            ids, options[2], constraint=Failing("accept", 2, OpenELMError("stuck"))
        )
        yield replace(ask(ids, replace(seeded, seed=None)), keys=failing_keys)


REQUESTS = list(make_requests())


def renewed(request, **changes):
    constraint = request.constraint and request.constraint.copy()
    return replace(request, constraint=constraint, **changes)


@dataclass
class Answered:
    """An answer so far."""

    tokens: list
    logprobs: list
    text: str
    reason: str | None
    failure: str
    scored: list

    @classmethod
    def of(cls, answers, request):
        outputs = answers.outputs[request]
        return cls(
            answers.tokens(request),
            [o.token.logprob for o in outputs if o.token is not None],
            answers.text(request),
            outputs[-1].finish_reason,
            str(outputs[-1].error or ""),
            [token.id for token in outputs[0].prompt_tokens],
        )


@cache
def answer_alone(number, path):
    """Return a request's answer by `stream`, or else by an engine of its own."""
    request = REQUESTS[number]
    own_model = MODELS[request.model]
    is_drawn = request.sampling.temp > 0 and not request.draws_as_alone
    fails = POISON in request.ids or isinstance(request.constraint, Failing)
    if not (is_drawn or fails or request.scores_prompt):
        pieces = alone(request, own_model)
        tokens = [piece.token for piece in pieces]
        if POISON not in tokens:
            logprobs = [piece.logprob for piece in pieces]
            text = "".join(piece.text for piece in pieces)
            return Answered(tokens, logprobs, text, pieces[-1].finish_reason, "", [])
    answers = Answers(make_engine({request.model: Poisoned(own_model)}))
    added = answers.add(renewed(request))
    answers.run()
    expected = Answered.of(answers, added)
    assert expected.scored == (request.ids[1:] if request.scores_prompt else [])
    return expected


def make_limits(chance):
    kept = [PrefixLimits(), PrefixLimits(prompts=0), PrefixLimits(2), PrefixLimits(3)]
    kept.append(PrefixLimits(bytes=2**17))
    return {
        "answers": chance.choice([1, 2, 3, 5, 9]),
        "prompts": chance.choice([1, 2, 4]),
        "fills_rows": chance.random() < 0.3,
        "kept": chance.choice(kept),
        "tuning": Tuning(chance.choice(QUEUES), chance.choice([None, True])),
    }


def check_random_order(seed, path, monkeypatch):
    if path == "gpu":
        monkeypatch.setenv(FORCED_PATH, "1")
    for module in (prefix_tree, batch_prompts):
        monkeypatch.setattr(module, "SHORTEST", 6)
    monkeypatch.setattr(batch_prompts, "PREFILL_CHUNK", 12)
    monkeypatch.setattr(rows, "REACH", 4)
    for kind in (KVCache, SlotCache):
        monkeypatch.setattr(kind, "step", 8)
    chance = random.Random(seed)
    now, rate = 0.0, 0.0

    def fail_sometimes(kind, name):
        call = getattr(kind, name)

        def called(*arguments):
            if chance.random() < rate:
                raise MemoryError("out of memory")
            return call(*arguments)

        monkeypatch.setattr(kind, name, called)

    defects = []  # the engine answers in spite of them

    def record_defects(kind, name):
        call = getattr(kind, name)

        def called(*arguments):
            errors = [a for a in arguments if isinstance(a, Exception)]
            try:
                return call(*arguments)
            except Exception as error:
                errors.append(error)
                raise
            finally:
                defects.extend(e for e in errors if str(e) not in REASONS)

        monkeypatch.setattr(kind, name, called)

    for kind, name in FAILURES:
        fail_sometimes(kind, name)
    record_defects(Engine, "_recover")
    record_defects(DecodeRows, "remove_ended")
    record_defects(PrefixTree, "insert")
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(sequences, "time", clock)

    most = chance.choice([0, 0, 0.01, 0.05, 0.3])  # the rate at which calls fail
    limits = make_limits(chance)
    models = {name: Poisoned(own) for name, own in MODELS.items()}
    engine = make_engine(models, **limits)
    answers = Answers(engine)
    numbers, gone = {}, set()
    few = chance.sample(range(len(REQUESTS)), chance.choice([4, 20, 80]))
    for _ in range(chance.randint(10, 40)):
        rate = chance.choice([0, most])
        added = chance.choices(few, k=chance.choice([0, 0, 1, 1, 4]))
        if chance.random() < 0.3:  # as the choices of one completion
            added = added[:1] * 4
        for number in added:
            late = chance.random() < 0.1
            deadline = now + chance.choice([-1, 1, 3]) if late else None
            request = answers.add(renewed(REQUESTS[number], deadline=deadline))
            numbers[request] = number
        if numbers and chance.random() < 0.4:
            cancelled = chance.sample(list(numbers), chance.randint(1, len(numbers)))
            cancelled = cancelled[: chance.choice([1, 1, 3, 9])]
            answers.engine.cancel(cancelled)
            gone |= {request for request in cancelled if request not in answers.order}
        for _ in range(chance.choice([0, 1, 1, 2, 5])):
            now += chance.random() / 3
            answers.step()
            assert engine.decoding <= limits["answers"]
    if chance.random() < 0.5:
        rate = 0
    answers.run()
    rate = 0

    assert not defects
    assert (engine.waiting, engine.decoding) == (0, 0)
    assert engine.kept_bytes <= limits["kept"].bytes
    assert len(set(answers.order)) == len(answers.order)
    for request, number in numbers.items():
        outputs, ended = answers.outputs[request], request in answers.order
        assert ended != (request in gone)
        if not outputs:
            continue
        actual, expected = Answered.of(answers, request), answer_alone(number, path)
        assert not any(output.is_last for output in outputs[:-1])
        assert not any(output.prompt_tokens for output in outputs[1:])
        count = len(actual.tokens)
        assert actual.tokens == expected.tokens[:count]
        logprobs = pytest.approx(expected.logprobs[:count], abs=1e-4)
        assert actual.logprobs == logprobs
        assert expected.text.startswith(actual.text)
        if isinstance(outputs[-1].error, DeadlineError):
            assert request.deadline < now
        elif "out of memory" in actual.failure:
            assert most
        elif expected.failure and ended:
            assert actual.failure  # where two failures are made, either
        elif ended:
            assert replace(actual, logprobs=[]) == replace(expected, logprobs=[])


@pytest.mark.parametrize("seed", range(6))
def test_random_sequences_of_requests(seed, monkeypatch):
    check_random_order(seed, ("gpu", "cpu")[seed % 2], monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize("path", ["cpu", "gpu"])
@pytest.mark.parametrize("start", range(100, 400, 50))
def test_many_random_sequences_of_requests(start, path):
    for seed in range(start, start + 50):
        with pytest.MonkeyPatch.context() as monkeypatch:
            check_random_order(seed, path, monkeypatch)
