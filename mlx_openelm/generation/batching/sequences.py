"""Requests of the engine, the sequences made of them, and what each step returns."""

import hashlib
import itertools
import logging
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.constraints import Constraint
from mlx_openelm.generation.decoding import Token
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.stopping import Answer

# Returns the random key (two words) of the token at a position of the answer.
TokenKeys = Callable[[int], Sequence[int]]
_KEYS_AT_ONCE = 64

log = logging.getLogger(__name__)


class DeadlineError(OpenELMError):
    """A request was not complete at its deadline."""


@dataclass(frozen=True, eq=False, slots=True)
class BatchRequest:
    """A prompt, and how to continue it.

    Attributes:
        ids: the prompt's token ids.
        keys: its random keys; used with a temperature above 0.
        model: name of the model or adapter.
        constraint: the grammar that the answer must follow.
        deadline: `time.monotonic` after which the request fails.
        scores_prompt: also compute the log-probabilities of the prompt's tokens.
        generates: whether it is continued; else its prompt is only processed.
        draws_as_alone: with `seeded_keys`, draw the tokens that `stream` draws.
    """

    ids: Sequence[int]
    sampling: Sampling
    keys: TokenKeys
    model: str = ""
    constraint: Constraint | None = None
    deadline: float | None = None
    scores_prompt: bool = False
    generates: bool = True
    draws_as_alone: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """What a step adds to one answer.

    Attributes:
        text: text that is final since the last output; may be empty.
        token: the drawn token, EOS included; None: the request has failed, or it only
            scores its prompt.
        finish_reason: None except in the last output; see `stopping.Answer`.
        error: why the request has failed; with a cause where it is a defect.
        cached_tokens: prompt tokens that were not processed again.
        prompt_tokens: the prompt's tokens with their log-probabilities, in the first
            output, if the request asks for them.
    """

    request: BatchRequest
    text: str = ""
    token: Token | None = None
    finish_reason: str | None = None
    error: OpenELMError | None = None
    cached_tokens: int = 0
    prompt_tokens: tuple[Token, ...] = ()

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False, slots=True)
class SequenceState:
    """A request in the engine and its answer so far.

    Attributes:
        arrival: its place in the order of arrival.
        ids: the prompt; after a failed step also the tokens drawn so far.
        array: `ids` as a numpy array.
        cached: first tokens whose keys and values were kept from earlier prompts.
        matched_version: version of the prefix tree in which they were looked up.
        parts: keys and values of all ids but the last, two arrays (1, K, T, H) per
            layer, while the sequence waits for its row; empty for a single id.
        offset: tokens in its row, including those of queued steps.
        written: tokens drawn, including those of queued steps.
        has_failed: whether a step of its batch has failed since its newest token, and
            no sequence of the batch has failed alone.
        error: why it has ended.
        history: last tokens (L,), where its sampling needs them.
    """

    request: BatchRequest
    answer: Answer
    arrival: int
    ids: list[int]
    array: np.ndarray = field(init=False)
    cached: int = 0
    matched_version: int = -1
    parts: list[mx.array] = field(default_factory=list)
    offset: int = 0
    written: int = 0
    has_failed: bool = False
    history: mx.array | None = None
    prompt_tokens: tuple[Token, ...] = ()
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.array = np.array(self.ids, np.int64)

    @property
    def has_ended(self) -> bool:
        return self.answer.finish_reason is not None or self.error is not None

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are still to be computed."""
        return self.request.scores_prompt and not self.answer.tokens

    @property
    def cached_tokens(self) -> int:
        """Number of prompt tokens that were not processed again."""
        return min(self.cached, len(self.request.ids))

    def restart(self) -> None:
        """Return to the state before its prompt was processed, keeping its answer."""
        self.ids = [*self.request.ids, *self.answer.tokens]
        self.cached, self.matched_version = 0, -1
        self.error = None  # a constraint may have failed in the failed step
        self.array = np.array(self.ids, np.int64)
        self.written = len(self.answer.tokens)
        self.parts, self.history = [], None

    def add(self, token: Token) -> Output:
        """Append the next token to the answer."""
        self.has_failed = False
        constraint = self.request.constraint
        try:
            text = self.answer.add(token.id)
            reason = self.answer.finish_reason
            if constraint is not None and reason is None:
                constraint.accept(token.id)
        except Exception as error:  # must not end the other requests
            return self.fail(error)
        prompt_tokens, self.prompt_tokens = self.prompt_tokens, ()
        return Output(
            self.request,
            text,
            token=token,
            finish_reason=reason,
            cached_tokens=self.cached_tokens,
            prompt_tokens=prompt_tokens,
        )

    def end_after_prompt(self) -> Output:
        """End a sequence that only scores its prompt."""
        self.answer.finish_reason = "length"
        return Output(
            self.request, finish_reason="length", prompt_tokens=self.prompt_tokens
        )

    def fail(self, error: Exception) -> Output:
        """End the sequence with an error."""
        self.error = error = as_request_error(error)
        return Output(self.request, error=error, cached_tokens=self.cached_tokens)


def as_request_error(error: Exception) -> OpenELMError:
    """Return why a request has failed; another error than ours is the cause of it."""
    if isinstance(error, OpenELMError):
        return error
    log.error("A request has failed.", exc_info=error)
    kind = type(error).__name__
    named = OpenELMError(f"The request failed: {kind}: {str(error)[:500]}")
    named.__cause__ = error
    return named


def hashed_keys(seed: int, number: int) -> TokenKeys:
    """Return keys that depend on a seed, the number of a prompt and the position."""

    def key(position: int) -> list[int]:
        packed = struct.pack("<3Q", seed, number, position)
        digest = hashlib.blake2b(packed, digest_size=8)
        return list(struct.unpack("<2I", digest.digest()))

    return key


def seeded_keys(seed: int) -> TokenKeys:
    """Return the keys that `mx.random` uses after `mx.random.seed(seed)`."""
    chain = _split_keys(seed)
    known: list[Sequence[int]] = []

    def key(position: int) -> Sequence[int]:
        while len(known) <= position:
            known.extend(itertools.islice(chain, _KEYS_AT_ONCE))
        return known[position]

    return key


def _split_keys(seed: int) -> Iterator[Sequence[int]]:
    state = mx.random.key(seed)
    while True:
        drawn = []
        for _ in range(_KEYS_AT_ONCE):
            state, following = mx.random.split(state)
            drawn.append(following)
        keys: list[list[int]] = mx.stack(drawn).tolist()  # type: ignore[assignment]
        yield from keys


def has_passed(deadline: float | None) -> bool:
    """Whether a time of `time.monotonic` has passed."""
    return deadline is not None and time.monotonic() > deadline
