"""The decode loop: a prompt's tokens in, drawn tokens out, one after the other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_openelm import openblas
from mlx_openelm.device import runs_on_linux_cpu
from mlx_openelm.generation.cache import KVCache, ModelCache
from mlx_openelm.generation.compact_caches import SlidingKVCache
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.sampling import (
    choose_tokens,
    history_length,
    shape_logits,
    top_logprobs,
)
from mlx_openelm.generation.step import Step, choose_step
from mlx_openelm.model.openelm import OpenELM

# Prompt tokens to a forward pass. Small ones save half of the masked scores, which cost
# most on the CPU.
PREFILL_CHUNK = 128 if runs_on_linux_cpu() else 512


@dataclass(frozen=True, slots=True)
class Token:
    """A drawn token.

    Attributes:
        logprob: what the model itself gives it, in nats, if `Sampling.logprobs` asks.
        alternatives: the likeliest tokens and their log-probabilities, likeliest first.
        drafted: whether it was guessed, and the model agreed.
    """

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    drafted: bool = False


class Context:
    """Tokens that went through a model, with their keys and values.

    Attributes:
        tokens: their ids; the cache may hold some more, that were queued in vain.
    """

    def __init__(
        self, model: OpenELM, make_cache: Callable[[], ModelCache] = KVCache
    ) -> None:
        """Begin with nothing, in one cache for each layer."""
        self.tokens: list[int] = []
        self.cache: list[ModelCache] = [make_cache() for _ in model.layers]
        self._make_cache = make_cache
        self._step: Step | None = None

    def step(self, model: OpenELM) -> Step:
        """Return this device's step; if it is compiled, then once for a context."""
        if self._step is None:
            self._step = choose_step(model)
        return self._step

    @property
    def slides(self) -> bool:
        """Whether it forgets what is old, and so never ends."""
        return isinstance(self.cache[0], SlidingKVCache)

    def reuse(self, ids: Sequence[int]) -> int:
        """Keep what begins as these ids do, and return how many tokens that is.

        The last id is never among them: its hidden state is what comes next.
        """
        kept = 0
        for ours, theirs in zip(self.tokens, ids[:-1], strict=False):
            if ours != theirs:
                break
            kept += 1
        # A layer by itself: what was interrupted may have reached some of them alone.
        if all(layer.can_trim(layer.offset - kept) for layer in self.cache):
            for layer in self.cache:
                layer.trim(layer.offset - kept)
        else:
            kept = 0
            self.cache[:] = [self._make_cache() for _ in self.cache]
        del self.tokens[kept:]
        return kept

    def read(self, model: OpenELM, ids: Sequence[int]) -> mx.array:
        """Let more tokens through the model, in chunks; return the last hidden states.

        Returns:
            (1, T, D), of the last chunk's T tokens.
        """
        openblas.use_threads(None)
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = list(ids[start : start + PREFILL_CHUNK])
            hidden = model.transformer(mx.array([chunk]), self.cache)  # (1, T, D)
            self.tokens += chunk
            # The last one, too: what follows may want fewer threads of the CPU.
            mx.eval(hidden, [layer.state for layer in self.cache])
        return hidden


class Drawing:
    """How logits become tokens along one text: its history, and what is told of it."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        context_length: int,
        eos_id: int,
    ) -> None:
        """Begin behind a prompt's ids."""
        self.sampling, self.eos_id = sampling, eos_id
        length = history_length(sampling, context_length)
        self.keeps_history = length > 0
        padding = [-1] * max(0, length - len(prompt))
        self.history = mx.array([padding + list(prompt[-length:])] if length else [[]])
        self.written = 0

    def draw(self, logits: mx.array) -> "Drawn":
        """Draw the next token from logits (1, V), and remember it."""
        tokens = choose_tokens(self.shape(logits), self.sampling)  # (1,)
        self.remember(tokens)
        return Drawn.of(tokens, logits, self.sampling.logprobs)

    def shape(self, logits: mx.array, guesses: mx.array | None = None) -> mx.array:
        """Apply the controls to logits (1, V) of the next token.

        Args:
            guesses: (k,), what may come next: the logits are (k + 1, V), of the next
                token and of what follows each of these.
        """
        history = self.history
        written: int | mx.array = self.written
        if guesses is not None:
            places = mx.arange(guesses.size + 1)
            if self.keeps_history:
                line = mx.concatenate([history[0], guesses])
                history = line[places[:, None] + mx.arange(history.shape[1])]
            if written < self.sampling.min_tokens:
                written = written + places
        return shape_logits(
            logits, history, self.sampling, written=written, eos_id=self.eos_id
        )

    def remember(self, tokens: mx.array) -> None:
        """Take tokens (N,) that were said into the history."""
        self.written += tokens.size
        if self.keeps_history:
            length = self.history.shape[1]
            joined = mx.concatenate([self.history, tokens[None]], axis=1)
            self.history = joined[:, -length:]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens (N,) that are perhaps not computed yet, and what is to be told of them."""

    tokens: mx.array
    told: tuple[mx.array, ...]

    @classmethod
    def of(cls, tokens: mx.array, logits: mx.array, logprobs: int) -> "Drawn":
        """Tell so many `logprobs` of tokens drawn from the model's logits (N, V)."""
        told = top_logprobs(logits, tokens, logprobs) if logprobs else ()
        return cls(tokens, told)

    def queue(self) -> None:
        mx.async_eval(self.tokens, *self.told)

    def read(self, drafted: int = 0) -> list[Token]:
        """Wait for the tokens; the first `drafted` of them were guessed."""
        ids, told = _to_lists(self.tokens), list(map(_to_lists, self.told))
        if not told:
            return [Token(id, drafted=i < drafted) for i, id in enumerate(ids)]
        return [
            Token(id, own, tuple(zip(others, values, strict=True)), i < drafted)
            for i, (id, own, others, values) in enumerate(zip(ids, *told, strict=True))
        ]


def _to_lists(array: mx.array) -> list[Any]:
    return array.tolist()  # type: ignore[return-value] # it has an axis


def draw_tokens(
    model: OpenELM,
    prompt: Sequence[int],
    sampling: Sampling,
    count: int,
    *,
    eos_id: int = 2,
    context: Context | None = None,
    step: Step | None = None,
) -> Iterator[Token]:
    """Yield `count` tokens; behind the first one, each step is queued ahead.

    Args:
        step: what takes a token through the model; by default this device's own.
        context: what it has in common with the prompt is not computed again; it holds
            all that went through the model in the end.
    """
    context = Context(model) if context is None else context
    step = step or context.step(model)
    drawing = Drawing(sampling, prompt, model.config.max_context_length, eos_id)
    known = context.reuse(prompt)
    hidden = context.read(model, prompt[known:])
    drawn = drawing.draw(model.head(hidden[:, -1]))
    (first,) = drawn.read()
    yield first  # before a step is built, or even compiled
    if count == 1:
        return
    drawn = drawing.draw(step(drawn.tokens, context.cache))
    context.tokens.append(first.id)
    try:
        for left in range(count - 2, -1, -1):
            following = drawn
            if left:
                following = drawing.draw(step(drawn.tokens, context.cache))
                following.queue()
            (token,) = drawn.read()
            if left:
                context.tokens.append(token.id)
            yield token
            drawn = following
    finally:
        openblas.use_threads(None)
