"""Speculative decoding: draft tokens are verified together, in one forward pass.

Leviathan et al., 2211.17192: a draft token x, drawn from q, is accepted with the
probability min(1, p(x) / q(x)); the first rejected one is resampled from the normalised
max(p - q, 0). The tokens are then distributed as if each had been drawn from p.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlx_openelm import openblas
from mlx_openelm.generation.compact_caches import SlidingKVCache
from mlx_openelm.generation.decoding import Context, DrawnTokens, Sampler, Token
from mlx_openelm.generation.drafters import Draft, Drafter
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.sampling import choose_tokens, distribution
from mlx_openelm.generation.step import Step, queued
from mlx_openelm.model.openelm import OpenELM


def draw_speculatively(
    model: OpenELM,
    prompt: Sequence[int],
    sampling: Sampling,
    count: int,
    drafter: Drafter,
    *,
    eos_id: int = 2,
    padding: mx.array | None = None,
    context: Context | None = None,
    step: Step | None = None,
) -> Iterator[Token]:
    """Yield `count` tokens as `draw_tokens` does, in fewer steps with good drafts.

    While drafts are rejected, tokens are drawn one by one, as fast as there.

    Args:
        drafter: its counters add up over all texts.
        step: the decode step, of one or several tokens; see `draw_tokens`.
        padding, context: see `draw_tokens`.
    """
    context = Context(model) if context is None else context
    step = step or context.step(model)
    context_length = model.config.max_context_length
    sampler = Sampler(sampling, prompt, context_length, eos_id, padding)
    text = _Text(model, prompt, count, drafter, sampler, context, step)
    drafter.pace.begin()
    reused = context.reuse(prompt)
    hidden = context.read(model, prompt[reused:])
    (first,) = sampler.draw(model.head(hidden[:, -1])).read()
    text.tokens.append(first.id)
    text.left -= 1
    yield first  # before a step is built and the drafter processes the prompt
    drafter.begin(prompt)
    try:
        while True:
            while draft := text.draft():
                yield from text.verify(draft)
            if not text.left:
                return
            drawn = text.draw_after(mx.array(text.tokens[-1:]))
            drawn.queue()
            context.tokens.append(text.tokens[-1])
            yield from text.draw_plainly(drawn)
    finally:
        openblas.use_threads(None)


class _Text:
    """A text being generated. The model has processed all but its last token."""

    def __init__(
        self,
        model: OpenELM,
        prompt: Sequence[int],
        count: int,
        drafter: Drafter,
        sampler: Sampler,
        context: Context,
        step: Step,
    ) -> None:
        self.tokens, self.left = list(prompt), count
        self._model, self._drafter, self._sampler = model, drafter, sampler
        self._context, self._step = context, step

    def draw_after(self, tokens: mx.array) -> DrawnTokens:
        """Return the token after this one, (1,), not evaluated."""
        return self._sampler.draw(self._step(tokens, self._context.cache))

    def draw_plainly(self, drawn: DrawnTokens) -> Iterator[Token]:
        """Yield the drawn token and further ones, until a draft may pay.

        Each step is queued before the previous token is read, so the decision about it
        is made one token ahead.
        """
        drafter, was_queued = self._drafter, False
        while True:
            expected = drafter.peek(self.tokens)
            can_draft = expected is not None or not drafter.is_free
            ends = self.left == 1 or (can_draft and self._draft_length(1) > 0)
            following = None if ends else self.draw_after(drawn.tokens)
            results = () if following is None else following.arrays
            with queued(results, self._context.cache, self._context.tuning.queue):
                (token,) = drawn.read()
            drafter.pace.record_step(was_queued)
            if expected is not None:
                drafter.pace.record_draft(expected == token.id)
            self.tokens.append(token.id)
            self.left -= 1
            if following is None:
                yield token
                return
            self._context.tokens.append(token.id)
            yield token
            drawn, was_queued = following, True

    def draft(self) -> Draft | None:
        """Return a draft if it is likely to pay."""
        count = self._draft_length()
        if not count:
            return None
        return self._drafter.propose(self.tokens, count, self._sampler)

    def _draft_length(self, ahead: int = 0) -> int:
        """Return how many tokens to draft after `ahead` more tokens; 0: none."""
        length = len(self.tokens) + ahead
        limit = min(self._model.config.max_context_length, self._drafter.context_length)
        for layer in self._context.cache:
            if isinstance(layer, SlidingKVCache):
                limit = min(limit, layer.max_size)  # a slid cache cannot be trimmed
            if not layer.can_trim(1):
                self._drafter.note = (
                    "Speculative decoding stops when a sliding cache is full."
                )
                return 0
        # The last token of a round is not a draft token.
        most = min(self.left - ahead - 1, limit - length)
        return self._drafter.pace.choose(most)

    def verify(self, draft: Draft) -> Iterator[Token]:
        """Yield the accepted draft tokens and one token more."""
        count = draft.tokens.size
        newest = mx.array(self.tokens[-1:])
        inputs = mx.concatenate([newest, draft.tokens])  # (k + 1,)
        logits = self._step(inputs, self._context.cache)  # (k + 1, V)
        logits = self._sampler.mask(logits)
        shaped = self._sampler.shape(logits, draft.tokens)
        sampling = self._sampler.sampling
        tokens, right = accept(shaped, draft, sampling)
        drawn = DrawnTokens.of(tokens, logits, sampling.logprobs)
        ties = _count_ties(shaped, right) if _may_tie(logits, sampling) else mx.array(0)
        mx.eval(right, ties, draft.tokens, tokens, *drawn.logprobs)
        accepted = int(right)
        new = drawn.read(accepted)[: accepted + 1]
        self._drafter.pace.record_round(count, accepted)
        self._drafter.record(draft.ids)
        self._drafter.drafted += count
        self._drafter.accepted += accepted
        self._drafter.equal_ties += int(ties)
        self._sampler.remember(mx.array([token.id for token in new]))
        for layer in self._context.cache:
            layer.trim(count - accepted)
        for token in new:
            self._context.tokens.append(self.tokens[-1])
            self.tokens.append(token.id)
            self.left -= 1
            yield token


def accept(
    shaped: mx.array, draft: Draft, sampling: Sampling
) -> tuple[mx.array, mx.array]:
    """Return tokens (k + 1,), and how many draft tokens are accepted.

    They begin with the accepted draft tokens and one of the model's own; the rest are
    not valid.

    Args:
        shaped: the model's logits for each draft token and for the one after the last,
            (k + 1, V).
    """
    drafted = draft.tokens
    count = drafted.size
    if sampling.temp == 0:
        tokens = choose_tokens(shaped, sampling)
        return tokens, _count_leading(tokens[:count] == drafted)
    own = distribution(shaped, sampling)
    if draft.logprobs is None:
        theirs = mx.where(mx.arange(own.shape[-1]) == drafted[:, None], 0.0, -mx.inf)
    else:
        theirs = draft.logprobs
    ratios = mx.take_along_axis(own[:count] - theirs, drafted[:, None], axis=-1)[:, 0]
    right = _count_leading(mx.log(mx.random.uniform(shape=(count,))) < ratios)
    probs = mx.exp(own[right])
    excess = mx.maximum(probs - mx.exp(theirs[mx.minimum(right, count - 1)]), 0)
    # Rounding may leave no excess of two equal distributions.
    resampled = (right < count) & (excess.sum() > 0)
    last = mx.random.categorical(mx.log(mx.where(resampled, excess, probs)))
    padded = mx.concatenate([drafted, drafted[-1:]])
    return mx.where(mx.arange(count + 1) < right, padded, last.astype(mx.int32)), right


def _count_leading(agree: mx.array) -> mx.array:
    """Return the number of true values before the first false one."""
    return mx.cumprod(agree.astype(mx.int32)).sum()


def _may_tie(logits: mx.array, sampling: Sampling) -> bool:
    return sampling.temp == 0 and logits.dtype != mx.float32


def _count_ties(shaped: mx.array, right: mx.array) -> mx.array:
    """Return how many of the valid tokens share the largest logit with another one."""
    largest = shaped.max(axis=-1, keepdims=True)
    shared = (shaped == largest).sum(axis=-1) > 1  # (k + 1,)
    return (shared & (mx.arange(shared.size) <= right)).sum()
