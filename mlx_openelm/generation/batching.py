"""Continuous batching: each decode step serves all prompts of the batch.

While decoding is bound by reading the weights, a step costs hardly more for many rows
than for one. The row of a finished answer goes to the next prompt at once (Yu et al.,
Orca, OSDI 2022).
"""

import hashlib
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import mlx.core as mx

from mlx_openelm import openblas
from mlx_openelm.generation.cache import KVCache, SlotCache
from mlx_openelm.generation.decoding import PREFILL_CHUNK, DrawnTokens, Token
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.sampling import (
    choose_tokens,
    find_padding,
    history_length,
    mask_padding,
    shape_logits,
    temper,
)
from mlx_openelm.generation.stopping import Answer
from mlx_openelm.generation.streaming import check_length
from mlx_openelm.model.kernels import use_decoding_threads
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer

BATCH_SIZE = 16
REACH = 32  # slots: the attended part of the cache is a multiple of this


@dataclass(frozen=True, slots=True)
class BatchPrompt:
    """A prompt's ids, and its number, which selects its random numbers.

    Attributes:
        ending: `max_tokens`, `stop` and `stop_loops` of its answer, if they are not
            those of the batch.
    """

    number: int
    ids: Sequence[int]
    ending: Sampling | None = None


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
        on_step: receives the number of new tokens after each step.

    Raises:
        OpenELMError: a prompt is empty, too long, or holds ids out of range.
    """
    mx.reset_peak_memory()
    waiting = iter(prompts)
    rows = _Rows(model, tokenizer, sampling, islice(waiting, batch_size))
    queued = None
    try:
        while rows.sequences:
            following = rows.queue_step()  # unused for answers that end before it
            if queued is not None:
                grown = queued.read()
                on_step(len(grown))
                rows.replace_ended(waiting)
                yield from (s.conclude() for s in grown if s.answer.finish_reason)
            queued = following
    finally:
        openblas.use_threads(None)


class _Sequence:
    """A prompt in the batch and its answer so far.

    Attributes:
        is_new: whether its prompt is still to be processed.
        offset: tokens in the cache, including those of queued steps.
        written: tokens drawn, including those of queued steps.
    """

    def __init__(
        self,
        prompt: BatchPrompt,
        model: OpenELM,
        tokenizer: Tokenizer,
        sampling: Sampling,
    ) -> None:
        budget = check_length(prompt.ids, model, sampling)
        self.prompt = prompt
        self.answer = Answer(tokenizer, prompt.ids, sampling, budget)
        self.is_new = True
        self.offset = len(prompt.ids) - 1  # the next step processes the last one
        self.written = 0
        self._text: list[str] = []
        self._drawn: list[Token] = []
        self._started = self._first = time.perf_counter()

    def add(self, token: Token) -> None:
        """Append the next token to the answer."""
        if not self._drawn:
            self._first = time.perf_counter()
        self._drawn.append(token)
        self._text.append(self.answer.add(token.id))

    def conclude(self) -> Answered:
        """Return the complete answer."""
        assert self.answer.finish_reason
        until_first = self._first - self._started
        since = time.perf_counter() - self._first
        more = len(self._drawn) - 1
        return Answered(
            prompt=self.prompt,
            text="".join(self._text),
            drawn=tuple(self._drawn),
            tokens=tuple(self.answer.tokens),
            finish_reason=self.answer.finish_reason,
            prompt_tps=len(self.prompt.ids) / until_first,
            generation_tps=more / since if more else 0.0,
            time_to_first_token_s=until_first,
            peak_memory_bytes=mx.get_peak_memory(),
        )


@dataclass(frozen=True, slots=True)
class _Step:
    """A queued step: the sequences of its rows and the tokens drawn for them."""

    sequences: tuple[_Sequence, ...]
    drawn: DrawnTokens

    def read(self) -> list[_Sequence]:
        """Wait for the tokens; return the unfinished sequences, which got one each."""
        tokens = zip(self.sequences, self.drawn.read(), strict=True)
        unfinished = [(s, token) for s, token in tokens if not s.answer.finish_reason]
        for sequence, token in unfinished:
            sequence.add(token)
        return [sequence for sequence, _ in unfinished]


class _Rows:
    """The sequences of the batch and their rows in the caches."""

    def __init__(
        self,
        model: OpenELM,
        tokenizer: Tokenizer,
        sampling: Sampling,
        prompts: Iterable[BatchPrompt],
    ) -> None:
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self.sequences = [self._admit(prompt) for prompt in prompts]
        rows = len(self.sequences)
        self._cache = [SlotCache(rows) for _ in model.layers]
        self._history_length = history_length(sampling, model.config.max_context_length)
        self._padding = find_padding(tokenizer, model.config.vocab_size)
        self._tokens = mx.zeros((rows,), mx.int32)  # the newest of each row
        self._history = mx.zeros((rows, self._history_length), mx.int32)
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._prefill_new()

    def queue_step(self) -> _Step:
        """Process the newest token of every row and draw the next one."""
        offsets = mx.array([sequence.offset for sequence in self.sequences])
        longest = max(sequence.offset for sequence in self.sequences) + 1
        for layer in self._cache:
            layer.offset, layer.reach = offsets, -(-longest // REACH) * REACH
        use_decoding_threads(self._model.config)
        hidden = self._model.transformer(self._tokens[:, None], self._cache)
        logits = mask_padding(self._model.head(hidden[:, -1]), self._padding)  # (R, V)
        self._tokens = self._draw(logits)
        drawn = DrawnTokens.of(self._tokens, logits, self._sampling.logprobs)
        drawn.queue()
        for sequence in self.sequences:
            sequence.offset += 1
            sequence.written += 1
        if self._history_length:
            joined = mx.concatenate([self._history, self._tokens[:, None]], axis=1)
            self._history = joined[:, 1:]
        return _Step(tuple(self.sequences), drawn)

    def replace_ended(self, waiting: Iterator[BatchPrompt]) -> None:
        """Give the rows of finished answers to waiting prompts, or remove them."""
        ended = [i for i, s in enumerate(self.sequences) if s.answer.finish_reason]
        if not ended:
            return
        for row, prompt in zip(ended, waiting, strict=False):
            self.sequences[row] = self._admit(prompt)
        kept = list(range(len(self.sequences)))
        for row in reversed(ended):
            if not self.sequences[row].answer.finish_reason:
                continue
            last = len(self.sequences) - 1
            if row < last:
                for layer in self._cache:
                    layer.move(last, row, self.sequences[last].offset)
            kept[row], self.sequences[row] = kept[last], self.sequences[last]
            del kept[last], self.sequences[last]
        if kept:
            self._tokens = self._tokens[mx.array(kept)]
            if self._history_length:
                self._history = self._history[mx.array(kept)]
            self._prefill_new()

    def _admit(self, prompt: BatchPrompt) -> _Sequence:
        ending = prompt.ending or self._sampling
        return _Sequence(prompt, self._model, self._tokenizer, ending)

    def _draw(self, logits: mx.array) -> mx.array:
        """Return the next token of every row, (R,)."""
        written = [sequence.written for sequence in self.sequences]
        shaped = shape_logits(
            logits,
            self._history,
            self._sampling,
            written=mx.array(written),
            eos_id=self._tokenizer.eos_id,
        )
        if self._sampling.temp == 0:
            return choose_tokens(shaped, self._sampling)
        numbers = [sequence.prompt.number for sequence in self.sequences]
        keys = [_make_key(self._seed, *at) for at in zip(numbers, written, strict=True)]
        tempered = temper(shaped, self._sampling)
        tokens: mx.array = mx.vmap(_draw_one)(tempered, mx.array(keys, mx.uint32))
        return tokens.astype(mx.int32)

    # Prompts ---------------------------------------------------------------------

    def _prefill_new(self) -> None:
        """Process the prompts of new sequences, except for their last tokens."""
        rows = [row for row, sequence in enumerate(self.sequences) if sequence.is_new]
        for row in rows:
            sequence, L = self.sequences[row], self._history_length
            sequence.is_new = False
            ids = list(sequence.prompt.ids)
            self._tokens[row] = ids[-1]
            if L:
                self._history[row] = mx.array(([-1] * L + ids)[-L:])
        for group in _group_by_length(
            rows, [self.sequences[row].offset for row in rows]
        ):
            self._prefill([(row, self.sequences[row].prompt.ids[:-1]) for row in group])

    def _prefill(self, prompts: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Process prompts as one right-padded batch and store them in their rows.

        Attention is causal, so no token sees the padding.
        """
        openblas.use_threads(None)
        longest = max(len(ids) for _, ids in prompts)
        tokens = mx.array([[*ids, *[0] * (longest - len(ids))] for _, ids in prompts])
        cache = [KVCache() for _ in self._cache]
        for start in range(0, longest, PREFILL_CHUNK):
            self._model.transformer(tokens[:, start : start + PREFILL_CHUNK], cache)
            mx.eval([layer.state for layer in cache])
        for slots, layer in zip(self._cache, cache, strict=True):
            keys, values = layer.state
            for i, (row, ids) in enumerate(prompts):
                at = (slice(i, i + 1), slice(None), slice(len(ids)))
                slots.put(row, keys[at], values[at])


def _group_by_length(rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Return groups of rows to prefill together, at most one chunk with padding.

    A longer row is a group of its own; a row of length 0 is in none.
    """
    groups: list[list[int]] = []
    for length, row in sorted(zip(lengths, rows, strict=True)):
        if groups and length * (len(groups[-1]) + 1) <= PREFILL_CHUNK:
            groups[-1].append(row)
        elif length:
            groups.append([row])
    return groups


def _make_key(seed: int, number: int, place: int) -> list[int]:
    """Return the random key (two words) of one token."""
    digest = hashlib.blake2b(struct.pack("<3Q", seed, number, place), digest_size=8)
    return list(struct.unpack("<2I", digest.digest()))


def _draw_one(logits: mx.array, key: mx.array) -> mx.array:
    return mx.random.categorical(logits, key=key)
