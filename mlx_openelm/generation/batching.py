"""Many prompts are answered together: one step of the model serves all of them.

A step costs hardly more for many rows than for one, as long as it is the weights that
are waited for. A row whose answer has ended gives its place to the next prompt at once
(continuous batching: Yu et al., Orca, OSDI 2022).
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
from mlx_openelm.generation.decoding import PREFILL_CHUNK, Drawn, Token
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.sampling import (
    choose_tokens,
    history_length,
    shape_logits,
    temper,
)
from mlx_openelm.generation.stopping import Answer
from mlx_openelm.generation.streaming import check_room
from mlx_openelm.model.kernels import use_decoding_threads
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer

BATCH_SIZE = 16
REACH = 32  # slots by which a step's look at the caches grows


@dataclass(frozen=True, slots=True)
class BatchPrompt:
    """A prompt's ids, and its number: what is drawn for it depends on both alone."""

    number: int
    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Answered:
    """A whole answer; see `generation.Piece` for what is not explained here.

    Attributes:
        drawn: all its tokens, EOS included.
        tokens: their ids, without EOS.
        time_to_first_token_s: since the prompt got its row.
        generation_tps: of this answer alone; those beside it come on top.
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
    """Answer prompts, `batch_size` at a time; yield each answer when it has ended.

    A greedy answer is what `generation.stream` says to the prompt alone. With a
    temperature, every token is drawn with a key of its own, made of the seed, the
    prompt's number and the place: neither the batch nor the order changes it.

    The caches hold `batch_size` times the longest sequence so far (in steps of 256
    tokens) times the bytes that `inspect` tells for a token.

    Args:
        prompts: taken one by one, when there is a row for them.
        on_step: told how many tokens the answers have grown by, after each step.

    Raises:
        OpenELMError: a prompt is empty, too long, or holds ids that there are not.
    """
    mx.reset_peak_memory()
    waiting = iter(prompts)
    rows = _Rows(model, tokenizer, sampling, islice(waiting, batch_size))
    queued = None
    try:
        while rows.seats:
            following = rows.queue_step()  # in vain where an answer ends before it
            if queued is not None:
                grown = queued.read()
                on_step(len(grown))
                rows.replace_ended(waiting)
                yield from (s.conclude() for s in grown if s.answer.finish_reason)
            queued = following
    finally:
        openblas.use_threads(None)


class _Seat:
    """A prompt in its row, and its answer so far.

    Attributes:
        is_new: whether its prompt is yet to be read.
        offset: tokens that went through the model, with the steps that are queued.
        written: tokens drawn, likewise.
    """

    def __init__(
        self,
        prompt: BatchPrompt,
        model: OpenELM,
        tokenizer: Tokenizer,
        sampling: Sampling,
    ) -> None:
        budget = check_room(prompt.ids, model, sampling)
        self.prompt = prompt
        self.answer = Answer(tokenizer, prompt.ids, sampling, budget)
        self.is_new = True
        self.offset = len(prompt.ids) - 1  # the last one goes with the next step
        self.written = 0
        self._text: list[str] = []
        self._drawn: list[Token] = []
        self._started = self._first = time.perf_counter()

    def add(self, token: Token) -> None:
        """Take the next token into the answer."""
        if not self._drawn:
            self._first = time.perf_counter()
        self._drawn.append(token)
        self._text.append(self.answer.add(token.id))

    def conclude(self) -> Answered:
        """Return the answer, which has ended."""
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
    """A queued step: who sat where, and what is drawn for them."""

    seats: tuple[_Seat, ...]
    drawn: Drawn

    def read(self) -> list[_Seat]:
        """Wait for the tokens and hand them out; return whose answers have grown."""
        tokens = zip(self.seats, self.drawn.read(), strict=True)
        going_on = [(s, token) for s, token in tokens if not s.answer.finish_reason]
        for seat, token in going_on:
            seat.add(token)
        return [seat for seat, _ in going_on]


class _Rows:
    """The prompts that are answered now, and their rows in the caches."""

    def __init__(
        self,
        model: OpenELM,
        tokenizer: Tokenizer,
        sampling: Sampling,
        prompts: Iterable[BatchPrompt],
    ) -> None:
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self.seats = [self._seat(prompt) for prompt in prompts]
        rows = len(self.seats)
        self._cache = [SlotCache(rows) for _ in model.layers]
        self._history_length = history_length(sampling, model.config.max_context_length)
        self._tokens = mx.zeros((rows,), mx.int32)  # the newest of each row
        self._history = mx.zeros((rows, self._history_length), mx.int32)
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._take_in()

    def queue_step(self) -> _Step:
        """Let the newest token of every row through the model, and draw the next."""
        offsets = mx.array([seat.offset for seat in self.seats])
        longest = max(seat.offset for seat in self.seats) + 1
        for layer in self._cache:
            layer.offset, layer.reach = offsets, -(-longest // REACH) * REACH
        use_decoding_threads(self._model.config)
        hidden = self._model.transformer(self._tokens[:, None], self._cache)
        logits = self._model.head(hidden[:, -1])  # (R, V)
        self._tokens = self._draw(logits)
        drawn = Drawn.of(self._tokens, logits, self._sampling.logprobs)
        drawn.queue()
        for seat in self.seats:
            seat.offset += 1
            seat.written += 1
        if self._history_length:
            joined = mx.concatenate([self._history, self._tokens[:, None]], axis=1)
            self._history = joined[:, 1:]
        return _Step(tuple(self.seats), drawn)

    def replace_ended(self, waiting: Iterator[BatchPrompt]) -> None:
        """Give the rows of ended answers to who is waiting; else close the ranks."""
        ended = [i for i, seat in enumerate(self.seats) if seat.answer.finish_reason]
        if not ended:
            return
        for row, prompt in zip(ended, waiting, strict=False):
            self.seats[row] = self._seat(prompt)
        kept = list(range(len(self.seats)))
        for row in reversed(ended):
            if not self.seats[row].answer.finish_reason:
                continue
            last = len(self.seats) - 1
            if row < last:
                for layer in self._cache:
                    layer.move(last, row, self.seats[last].offset)
            kept[row], self.seats[row] = kept[last], self.seats[last]
            del kept[last], self.seats[last]
        if kept:
            self._tokens = self._tokens[mx.array(kept)]
            if self._history_length:
                self._history = self._history[mx.array(kept)]
            self._take_in()

    def _seat(self, prompt: BatchPrompt) -> _Seat:
        return _Seat(prompt, self._model, self._tokenizer, self._sampling)

    def _draw(self, logits: mx.array) -> mx.array:
        """Return the next token of every row, (R,)."""
        written = [seat.written for seat in self.seats]
        shaped = shape_logits(
            logits,
            self._history,
            self._sampling,
            written=mx.array(written),
            eos_id=self._tokenizer.eos_id,
        )
        if self._sampling.temp == 0:
            return choose_tokens(shaped, self._sampling)
        numbers = [seat.prompt.number for seat in self.seats]
        keys = [_make_key(self._seed, *at) for at in zip(numbers, written, strict=True)]
        tempered = temper(shaped, self._sampling)
        tokens: mx.array = mx.vmap(_draw_one)(tempered, mx.array(keys, mx.uint32))
        return tokens.astype(mx.int32)

    # Prompts ---------------------------------------------------------------------

    def _take_in(self) -> None:
        """Read the prompts of the new seats, but for their last tokens."""
        rows = [row for row, seat in enumerate(self.seats) if seat.is_new]
        for row in rows:
            seat, L = self.seats[row], self._history_length
            seat.is_new = False
            ids = list(seat.prompt.ids)
            self._tokens[row] = ids[-1]
            if L:
                self._history[row] = mx.array(([-1] * L + ids)[-L:])
        for group in _group_by_length(rows, [self.seats[row].offset for row in rows]):
            self._read([(row, self.seats[row].prompt.ids[:-1]) for row in group])

    def _read(self, prompts: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Read prompts together, padded at the right, and put them into their rows.

        No token sees what stands behind it, so none sees the padding.
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
    """Return rows that are read together: not much more than one chunk with padding.

    What has no length needs no reading.
    """
    groups: list[list[int]] = []
    for length, row in sorted(zip(lengths, rows, strict=True)):
        if groups and length * (len(groups[-1]) + 1) <= PREFILL_CHUNK:
            groups[-1].append(row)
        elif length:
            groups.append([row])
    return groups


def _make_key(seed: int, number: int, place: int) -> list[int]:
    """Return the key, two words, of the random numbers that draw one token."""
    digest = hashlib.blake2b(struct.pack("<3Q", seed, number, place), digest_size=8)
    return list(struct.unpack("<2I", digest.digest()))


def _draw_one(logits: mx.array, key: mx.array) -> mx.array:
    return mx.random.categorical(logits, key=key)
