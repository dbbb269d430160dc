"""Answer a series of prompts with equal options through the engine."""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import mlx.core as mx

from mlx_openelm import openblas
from mlx_openelm.generation.batching.engine import Engine, EngineLimits
from mlx_openelm.generation.batching.prefix_tree import PrefixLimits
from mlx_openelm.generation.batching.sequences import (
    BatchRequest,
    Output,
    hashed_keys,
)
from mlx_openelm.generation.constraints import Constraint
from mlx_openelm.generation.decoding import Token
from mlx_openelm.generation.options import Sampling
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.tuning import DEFAULT, Tuning

BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class BatchPrompt:
    """A prompt's ids, and its number, which selects its random numbers.

    Attributes:
        sampling: its options, if they are not those of the batch.
    """

    number: int
    ids: Sequence[int]
    sampling: Sampling | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """A complete answer; see `streaming.Piece` for the other attributes.

    Attributes:
        drawn: all its tokens, EOS included.
        tokens: their ids, without EOS.
        time_to_first_token_s: since the prompt entered the batch.
        generation_tps: of this answer alone, not of the batch.
    """

    prompt: BatchPrompt
    text: str
    drawn: tuple[Token, ...]
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tps: float
    generation_tps: float
    time_to_first_token_s: float
    peak_memory_bytes: int


def answer_together(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompts: Iterable[BatchPrompt],
    sampling: Sampling,
    *,
    batch_size: int = BATCH_SIZE,
    tuning: Tuning = DEFAULT,
    constraint: Constraint | None = None,
    on_step: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Answered]:
    """Answer prompts, `batch_size` at a time; yield each answer when it is complete.

    A greedy answer equals that of `streaming.stream` for the prompt alone. With a
    temperature, every token has its own random key, made of the seed, the prompt's
    number and the position, so the answer depends on neither the batch nor the order.

    The caches take `batch_size` times the longest sequence so far (rounded up to 256
    tokens) times the bytes per token that `inspect` reports.

    Args:
        prompts: consumed one by one, as rows become free.
        constraint: the grammar that each answer follows.
        on_step: receives the number of new tokens after each step.

    Raises:
        OpenELMError: a prompt is empty, too long, or holds ids out of range, or its
            answer has failed.
    """
    mx.reset_peak_memory()
    limits = EngineLimits(
        answers=batch_size,
        fills_rows=True,
        kept=PrefixLimits(prompts=batch_size),
        tuning=tuning,
    )
    engine = Engine({"": model}, tokenizer, limits)
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    waiting = iter(prompts)
    answers: dict[BatchRequest, _Collected] = {}
    try:
        while True:
            # Some wait in the engine, so that a row is given to the next at once.
            for prompt in islice(waiting, 2 * batch_size - len(answers)):
                keys = hashed_keys(seed, prompt.number)
                own = constraint and constraint.restarted()
                options = prompt.sampling or sampling
                request = BatchRequest(prompt.ids, options, keys, constraint=own)
                engine.add(request)
                answers[request] = _Collected(prompt, time.perf_counter())
            if not answers:
                return
            outputs = engine.step()
            if outputs:
                on_step(len(outputs))
            for output in outputs:
                if output.error is not None:
                    raise output.error
                answers[output.request].add(output)
                if output.finish_reason:
                    answer = answers.pop(output.request)
                    yield answer.conclude(output.finish_reason, tokenizer.eos_id)
    finally:
        openblas.use_threads(None)


@dataclass(eq=False, slots=True)
class _Collected:
    """An answer so far.

    Attributes:
        started, first: times of its start and of its first token.
    """

    prompt: BatchPrompt
    started: float
    first: float = 0.0
    text: list[str] = field(default_factory=list)
    drawn: list[Token] = field(default_factory=list)

    def add(self, output: Output) -> None:
        assert output.token is not None
        if not self.drawn:
            self.first = time.perf_counter()
        self.drawn.append(output.token)
        self.text.append(output.text)

    def conclude(self, finish_reason: str, eos_id: int) -> Answered:
        """Return the complete answer."""
        until_first = self.first - self.started
        since = time.perf_counter() - self.first
        more = len(self.drawn) - 1
        ids = tuple(token.id for token in self.drawn)
        return Answered(
            prompt=self.prompt,
            text="".join(self.text),
            drawn=tuple(self.drawn),
            tokens=ids[:-1] if ids[-1] == eos_id else ids,
            finish_reason=finish_reason,
            prompt_tps=len(self.prompt.ids) / until_first,
            generation_tps=more / since if more else 0.0,
            time_to_first_token_s=until_first,
            peak_memory_bytes=mx.get_peak_memory(),
        )
