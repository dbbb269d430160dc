"""Lossless short cuts: guessed tokens are verified, many in one forward pass.

Leviathan et al., 2211.17192: a guess x, drawn from q, is kept with the probability
min(1, p(x) / q(x)); the first one that is not is drawn anew from what p has more of
than q. So the tokens are distributed as if each had been drawn from p.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlx_openelm import openblas
from mlx_openelm.generation.compact_caches import SlidingKVCache
from mlx_openelm.generation.decoding import Context, Drawing, Drawn, Token
from mlx_openelm.generation.drafters import Draft, Drafter
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.sampling import choose_tokens, distribution
from mlx_openelm.generation.step import Step
from mlx_openelm.model.openelm import OpenELM


def draw_speculatively(
    model: OpenELM,
    prompt: Sequence[int],
    sampling: Sampling,
    count: int,
    drafter: Drafter,
    *,
    eos_id: int = 2,
    context: Context | None = None,
    step: Step | None = None,
) -> Iterator[Token]:
    """Yield `count` tokens, as `draw_tokens` does, with fewer steps where guesses hold.

    While they do not, tokens are drawn one by one and no slower than there.

    Args:
        drafter: it counts what it guessed, over all texts.
        step: what takes a single token through the model; see `draw_tokens`.
        context: what it has in common with the prompt is not computed again; it holds
            all that went through the model in the end.
    """
    context = Context(model) if context is None else context
    step = step or context.step(model)
    drawing = Drawing(sampling, prompt, model.config.max_context_length, eos_id)
    text = _Text(model, prompt, count, drafter, drawing, context, step)
    drafter.pace.begin()
    known = context.reuse(prompt)
    hidden = context.read(model, prompt[known:])
    (first,) = text.queue(model.head(hidden[:, -1])).read()
    text.tokens.append(first.id)
    text.left -= 1
    yield first  # before a step is built, or the drafter reads the prompt
    drafter.begin(prompt)
    try:
        while True:
            while draft := text.guess():
                yield from text.verify(draft)
            if not text.left:
                return
            drawn = text.step(mx.array(text.tokens[-1:]))
            context.tokens.append(text.tokens[-1])
            yield from text.draw_plainly(drawn)
    finally:
        openblas.use_threads(None)


class _Text:
    """A text as it grows. All but its last token have gone through the model."""

    def __init__(
        self,
        model: OpenELM,
        prompt: Sequence[int],
        count: int,
        drafter: Drafter,
        drawing: Drawing,
        context: Context,
        step: Step,
    ) -> None:
        self.tokens, self.left = list(prompt), count
        self._model, self._drafter, self._drawing = model, drafter, drawing
        self._context, self._step = context, step

    def queue(self, logits: mx.array) -> Drawn:
        """Begin to draw a token by logits (1, V)."""
        drawn = self._drawing.draw(logits)
        drawn.queue()
        return drawn

    def step(self, tokens: mx.array) -> Drawn:
        """Begin to draw the token behind these (1,)."""
        return self.queue(self._step(tokens, self._context.cache))

    def draw_plainly(self, drawn: Drawn) -> Iterator[Token]:
        """Yield what is drawn, and more, until guessing may pay.

        Each next step is queued before a token is read, so it is decided one token
        ahead whether there is one.
        """
        drafter, queued = self._drafter, False
        while True:
            expected = drafter.expect(self.tokens)
            has_guess = expected is not None or not drafter.is_free
            ends = self.left == 1 or (has_guess and self._affordable(1) > 0)
            following = None if ends else self.step(drawn.tokens)
            (token,) = drawn.read()
            drafter.pace.read_plain(queued)
            if expected is not None:
                drafter.pace.judge(expected == token.id)
            self.tokens.append(token.id)
            self.left -= 1
            if following is None:
                yield token
                return
            self._context.tokens.append(token.id)
            yield token
            drawn, queued = following, True

    def guess(self) -> Draft | None:
        """Return a draft if it is likely to pay."""
        count = self._affordable()
        if not count:
            return None
        return self._drafter.propose(self.tokens, count, self._drawing)

    def _affordable(self, ahead: int = 0) -> int:
        """How many tokens to guess, when `ahead` more are known; 0: none."""
        known = len(self.tokens) + ahead
        room = min(self._model.config.max_context_length, self._drafter.context_length)
        for layer in self._context.cache:
            if isinstance(layer, SlidingKVCache):
                room = min(room, layer.max_size)  # what has slid is not taken back
            if not layer.can_trim(1):
                self._drafter.note = "Nothing is guessed with a cache that has slid."
                return 0
        # The last token of a round is no guess.
        most = min(self.left - ahead - 1, room - known)
        return self._drafter.pace.choose(most)

    def verify(self, draft: Draft) -> Iterator[Token]:
        """Yield the guesses that hold, and one token more."""
        count = draft.tokens.size
        newest = mx.array(self.tokens[-1:])
        given = mx.concatenate([newest, draft.tokens])[None]  # (1, k + 1)
        hidden = self._model.transformer(given, self._context.cache)
        logits = self._model.head(hidden[0])  # (k + 1, V)
        shaped = self._drawing.shape(logits, draft.tokens)
        sampling = self._drawing.sampling
        tokens, right = accept(shaped, draft, sampling)
        drawn = Drawn.of(tokens, logits, sampling.logprobs)
        ties = _count_ties(shaped, right) if _may_tie(logits, sampling) else mx.array(0)
        mx.eval(right, ties, draft.tokens, tokens, *drawn.told)
        held, tied = int(right), int(ties)
        found = drawn.read(held)[: held + 1]
        self._drafter.pace.read_round(count, held)
        self._drafter.settle(draft.ids)
        self._drafter.drafted += count
        self._drafter.accepted += held
        self._drafter.equal_ties += tied
        self._drawing.remember(mx.array([token.id for token in found]))
        for layer in self._context.cache:
            layer.trim(count - held)
        for token in found:
            self._context.tokens.append(self.tokens[-1])
            self.tokens.append(token.id)
            self.left -= 1
            yield token


def accept(
    shaped: mx.array, draft: Draft, sampling: Sampling
) -> tuple[mx.array, mx.array]:
    """Return tokens (k + 1,), and how many guesses they begin with.

    The token behind those is the model's own; what comes after it is void.

    Args:
        shaped: the model's logits at each guess and behind the last one, (k + 1, V).
    """
    guesses = draft.tokens
    count = guesses.size
    if sampling.temp == 0:
        tokens = choose_tokens(shaped, sampling)
        return tokens, _leading(tokens[:count] == guesses)
    own = distribution(shaped, sampling)
    if draft.logprobs is None:
        theirs = mx.where(mx.arange(own.shape[-1]) == guesses[:, None], 0.0, -mx.inf)
    else:
        theirs = draft.logprobs
    ratios = mx.take_along_axis(own[:count] - theirs, guesses[:, None], axis=-1)[:, 0]
    right = _leading(mx.log(mx.random.uniform(shape=(count,))) < ratios)
    probs = mx.exp(own[right])
    excess = mx.maximum(probs - mx.exp(theirs[mx.minimum(right, count - 1)]), 0)
    # Rounding may leave nothing of two that are equal.
    drawn_anew = (right < count) & (excess.sum() > 0)
    last = mx.random.categorical(mx.log(mx.where(drawn_anew, excess, probs)))
    padded = mx.concatenate([guesses, guesses[-1:]])
    return mx.where(mx.arange(count + 1) < right, padded, last.astype(mx.int32)), right


def _leading(agree: mx.array) -> mx.array:
    """How many are true before the first that is not."""
    return mx.cumprod(agree.astype(mx.int32)).sum()


def _may_tie(logits: mx.array, sampling: Sampling) -> bool:
    return sampling.temp == 0 and logits.dtype != mx.float32


def _count_ties(shaped: mx.array, right: mx.array) -> mx.array:
    """How many of the tokens that count share their logit with another one."""
    largest = shaped.max(axis=-1, keepdims=True)
    shared = (shaped == largest).sum(axis=-1) > 1  # (k + 1,)
    return (shared & (mx.arange(shared.size) <= right)).sum()
