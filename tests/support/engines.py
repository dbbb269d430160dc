"""An engine without HTTP, its requests, and the answers that it gives."""

import random
from dataclasses import replace

import numpy as np
import pytest
from models import UNEVEN, build, small_tokenizer

from mlx_openelm.generation.batching.engine import Engine, EngineLimits
from mlx_openelm.generation.batching.sequences import BatchRequest, hashed_keys
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import stream

CONTEXT = 512
tokenizer = small_tokenizer()
model = build(replace(UNEVEN, max_context_length=CONTEXT), seed=4)
EOS = tokenizer.eos_id
NEVER = ((EOS, -1e6),)
LONG = Sampling(max_tokens=400, logit_bias=NEVER)
SHORT = Sampling(max_tokens=4, logit_bias=NEVER)


POISON = 299  # a token id


class Poisoned:
    """A model that fails at one token id, or where a batch is too large."""

    def __init__(self, own=model, *, most_rows=99):
        self.config, self.layers, self.head = own.config, own.layers, own.head
        self.own, self.most_rows = own, most_rows

    def transformer(self, tokens, cache, **layout):
        if POISON in tokens.flatten().tolist():
            raise ValueError("poison")
        if tokens.shape[0] > self.most_rows:
            raise MemoryError("too many rows")
        return self.own.transformer(tokens, cache, **layout)


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

    def copy(self):
        return Failing(self.place, self.step, self.error)

    restarted = copy


def make_engine(models=None, **limits):
    return Engine(models or {"": model}, tokenizer, EngineLimits(**limits))


def make_ids(count, *, seed=0):
    return [1, *random.Random(seed).choices(range(3, 290), k=count - 1)]


def ask(ids, sampling=SHORT, **options):
    return BatchRequest(ids, sampling, hashed_keys(0, 0), **options)


class Answers:
    """Runs an engine and collects its outputs by request."""

    def __init__(self, engine):
        self.engine, self.outputs, self.order = engine, {}, []

    def add(self, *requests):
        for request in requests:
            self.outputs[request] = []
            self.engine.add(request)
        return requests[0]

    def step(self):
        for output in self.engine.step():
            self.outputs[output.request].append(output)
            if output.finish_reason or output.error:
                self.order.append(output.request)

    def run(self, *, most_steps=3000):
        for _ in range(most_steps):
            if self.engine.is_idle:
                return self
            self.step()
        raise AssertionError("the engine does not come to an end")

    def run_until(self, *requests, most_steps=3000):
        for _ in range(most_steps):
            if all(request in self.order for request in requests):
                return
            self.step()
        raise AssertionError("the requests do not come to an end")

    def tokens(self, request):
        return [o.token.id for o in self.outputs[request] if o.token is not None]

    def text(self, request):
        return "".join(output.text for output in self.outputs[request])

    def end(self, request):
        return self.outputs[request][-1]


def answer(*requests, **limits):
    answers = Answers(make_engine(**limits))
    answers.add(*requests)
    return answers.run()


def alone(request, own_model=model):
    constraint = request.constraint
    return list(
        stream(
            own_model, tokenizer, request.ids, request.sampling, constraint=constraint
        )
    )


def assert_as_alone(answers, request, own_model=model):
    pieces = alone(request, own_model)
    assert answers.tokens(request) == [piece.token for piece in pieces]
    assert answers.text(request) == "".join(piece.text for piece in pieces)
    assert answers.end(request).finish_reason == pieces[-1].finish_reason
    for output, piece in zip(answers.outputs[request], pieces, strict=True):
        assert output.token.logprob == pytest.approx(piece.logprob, abs=1e-4)
