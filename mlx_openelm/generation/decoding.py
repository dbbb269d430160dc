"""The decode loop: prefill a prompt, then draw one token after another."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_openelm import openblas
from mlx_openelm.device import runs_on_linux_cpu
from mlx_openelm.generation.cache import KVCache, ModelCache
from mlx_openelm.generation.compact_caches import SlidingKVCache
from mlx_openelm.generation.constraints import Constraint, keep_allowed
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.sampling import (
    choose_tokens,
    history_length,
    mask_padding,
    shape_logits,
    top_logprobs,
)
from mlx_openelm.generation.step import Step, choose_step, queued
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.tuning import DEFAULT, Tuning

# Prompt tokens per forward pass. Small chunks save half of the masked attention scores,
# which dominate on the CPU.
PREFILL_CHUNK = 128 if runs_on_linux_cpu() else 2048
# Also while other texts are decoded, which waits for the chunk.
INTERLEAVED_CHUNK = min(PREFILL_CHUNK, 512)
FEW = 8  # tokens that are processed by a decode step


@dataclass(frozen=True, slots=True)
class Token:
    """A drawn token.

    Attributes:
        logprob: the model's own log-probability (nats), with `Sampling.logprobs`.
        alternatives: the likeliest tokens and their log-probabilities, likeliest first.
        drafted: whether it is an accepted draft token.
    """

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    drafted: bool = False


class Context:
    """Tokens that a model has processed, with their keys and values.

    Attributes:
        tokens: their ids. The cache may hold more: steps that were queued and not used.
    """

    def __init__(
        self,
        model: OpenELM,
        make_cache: Callable[[], ModelCache] = KVCache,
        tuning: Tuning = DEFAULT,
    ) -> None:
        """Start without tokens, with one cache per layer."""
        self.tuning = tuning
        self.tokens: list[int] = []
        self.cache: list[ModelCache] = [make_cache() for _ in model.layers]
        self._make_cache = make_cache
        self._step: Step | None = None

    def step(self, model: OpenELM) -> Step:
        """Return the step of the settings; a context compiles it at most once."""
        if self._step is None:
            self._step = choose_step(model, self.tuning)
        return self._step

    @property
    def slides(self) -> bool:
        """Whether it drops old tokens, so that its length is unbounded."""
        return isinstance(self.cache[0], SlidingKVCache)

    def reuse(self, ids: Sequence[int]) -> int:
        """Keep the common prefix with these ids and return its length.

        The last id is never part of it: its hidden state gives the next token.
        """
        kept = 0
        for ours, theirs in zip(self.tokens, ids[:-1], strict=False):
            if ours != theirs:
                break
            kept += 1
        # Each layer separately: an interrupted step may have reached only some.
        if all(layer.can_trim(layer.offset - kept) for layer in self.cache):
            for layer in self.cache:
                layer.trim(layer.offset - kept)
        else:
            kept = 0
            self.cache[:] = [self._make_cache() for _ in self.cache]
        del self.tokens[kept:]
        return kept

    def read(self, model: OpenELM, ids: Sequence[int]) -> mx.array:
        """Process more tokens, in chunks.

        Returns:
            The hidden states of the last chunk's T tokens, (1, T, D).
        """
        openblas.use_threads(None)
        size = self.tuning.prefill_chunk or PREFILL_CHUNK
        for start in range(0, len(ids), size):
            chunk = list(ids[start : start + size])
            hidden = model.transformer(mx.array([chunk]), self.cache)  # (1, T, D)
            self.tokens += chunk
            # Also after the last chunk: what follows may set fewer CPU threads.
            mx.eval(hidden, [layer.state for layer in self.cache])
        return hidden

    def extend(self, model: OpenELM, ids: Sequence[int]) -> mx.array:
        """Process more tokens, without waiting for the result if they are few.

        Returns:
            The logits after the last one, (1, V).
        """
        if len(ids) > FEW:
            return model.head(self.read(model, ids)[:, -1])
        logits = self.step(model)(mx.array(list(ids)), self.cache)
        self.tokens += ids  # no more than the cache holds, if the step fails
        return logits[-1:]


class Sampler:
    """Draws the tokens of one text from logits, with the history that it needs."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        context_length: int,
        eos_id: int,
        padding: mx.array | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """Start after a prompt's ids; for `padding` see `sampling.find_padding`."""
        self.sampling, self.eos_id, self._padding = sampling, eos_id, padding
        self._constraint = constraint
        length = history_length(sampling, context_length)
        self.keeps_history = length > 0
        empty = [-1] * max(0, length - len(prompt))
        self.history = mx.array([empty + list(prompt[-length:])] if length else [[]])
        self.written = 0

    def draw(self, logits: mx.array) -> "DrawnTokens":
        """Draw the next token from logits (1, V) and add it to the history."""
        logits = self.mask(logits)
        shaped = self.shape(logits)
        if self._constraint is not None:
            allowed = self._constraint.allowed(logits.shape[-1])
            shaped = keep_allowed(logits, shaped, mx.array(allowed)[None])
        tokens = choose_tokens(shaped, self.sampling)  # (1,)
        self.remember(tokens)
        return DrawnTokens.of(tokens, logits, self.sampling.logprobs)

    def mask(self, logits: mx.array) -> mx.array:
        """Exclude the padding rows from the model's logits (N, V)."""
        return mask_padding(logits, self._padding)

    def shape(self, logits: mx.array, draft: mx.array | None = None) -> mx.array:
        """Apply bias and penalties to masked logits (1, V) of the next token.

        Args:
            draft: draft tokens (k,). Then the logits are (k + 1, V): those of the next
                token and those after each draft token.
        """
        history = self.history
        written: int | mx.array = self.written
        if draft is not None:
            places = mx.arange(draft.size + 1)
            if self.keeps_history:
                line = mx.concatenate([history[0], draft])
                history = line[places[:, None] + mx.arange(history.shape[1])]
            if written < self.sampling.min_tokens:
                written = written + places
        return shape_logits(
            logits, history, self.sampling, written=written, eos_id=self.eos_id
        )

    def remember(self, tokens: mx.array) -> None:
        """Add drawn tokens (N,) to the history."""
        self.written += tokens.size
        if self.keeps_history:
            length = self.history.shape[1]
            joined = mx.concatenate([self.history, tokens[None]], axis=1)
            self.history = joined[:, -length:]


@dataclass(frozen=True, slots=True)
class DrawnTokens:
    """Drawn tokens (N,), not evaluated yet, with the `top_logprobs` arrays, if any."""

    tokens: mx.array
    logprobs: tuple[mx.array, ...]

    @classmethod
    def of(cls, tokens: mx.array, logits: mx.array, count: int) -> "DrawnTokens":
        """Add the log-probabilities of the `count` likeliest by the logits (N, V)."""
        return cls(tokens, top_logprobs(logits, tokens, count) if count else ())

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """The arrays to evaluate."""
        return self.tokens, *self.logprobs

    def queue(self) -> None:
        mx.async_eval(*self.arrays)

    def read(self, drafted: int = 0) -> list[Token]:
        """Wait for the tokens; the first `drafted` of them are draft tokens."""
        ids, logprobs = _to_lists(self.tokens), list(map(_to_lists, self.logprobs))
        if not logprobs:
            return [Token(id, drafted=i < drafted) for i, id in enumerate(ids)]
        columns = zip(ids, *logprobs, strict=True)
        return [
            Token(id, own, tuple(zip(others, values, strict=True)), i < drafted)
            for i, (id, own, others, values) in enumerate(columns)
        ]


def _to_lists(array: mx.array) -> list[Any]:
    return array.tolist()  # type: ignore[return-value] # not a scalar


def draw_tokens(
    model: OpenELM,
    prompt: Sequence[int],
    sampling: Sampling,
    count: int,
    *,
    eos_id: int = 2,
    padding: mx.array | None = None,
    context: Context | None = None,
    step: Step | None = None,
    constraint: Constraint | None = None,
) -> Iterator[Token]:
    """Yield `count` tokens; after the first one, each step is queued ahead.

    Args:
        padding: rows of the embedding without a token; see `sampling.find_padding`.
        constraint: which tokens may follow. Then only the forward pass of a step is
            queued ahead, as drawing needs the token before it.
        step: the decode step; by default the faster one on this device.
        context: its common prefix with the prompt is reused; afterwards it holds all
            processed tokens.
    """
    context = Context(model) if context is None else context
    step = step or context.step(model)
    context_length = model.config.max_context_length
    sampler = Sampler(sampling, prompt, context_length, eos_id, padding, constraint)
    reused = context.reuse(prompt)
    hidden = context.read(model, prompt[reused:])
    drawn = sampler.draw(model.head(hidden[:, -1]))
    (first,) = drawn.read()
    yield first  # before a step is built or compiled
    if count == 1:
        return
    if constraint is not None:
        constraint.accept(first.id)
    drawn = sampler.draw(step(drawn.tokens, context.cache))
    context.tokens.append(first.id)
    try:
        for left in range(count - 2, -1, -1):
            following = drawn
            if left:
                logits = step(drawn.tokens, context.cache)
                if constraint is None:
                    following = sampler.draw(logits)
                results = (logits,) if constraint is not None else following.arrays
                with queued(results, context.cache, context.tuning.queue):
                    (token,) = drawn.read()
            else:
                (token,) = drawn.read()
            if left:
                context.tokens.append(token.id)
            yield token
            if left and constraint is not None:
                constraint.accept(token.id)
                following = sampler.draw(logits)
            drawn = following
    finally:
        openblas.use_threads(None)
