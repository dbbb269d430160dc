"""Who guesses the next tokens: an earlier place in the text, or a smaller model."""

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.decoding import Context, Drawing
from mlx_openelm.generation.draft_pacing import Pace
from mlx_openelm.generation.sampling import choose_tokens, distribution
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer

LONGEST = 32  # tokens to a draft
NGRAMS = (4, 3, 2)  # tokens of the tail that is looked up, the longest one first


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens (k,), k >= 1, and how they were drawn.

    Attributes:
        logprobs: of each place, (k, V), float32; None: the guess was certain.
    """

    tokens: mx.array
    logprobs: mx.array | None = None

    @property
    def ids(self) -> list[int]:
        found: list[int] = self.tokens.tolist()  # type: ignore[assignment] # it has an axis
        return found


class Drafter(ABC):
    """Guesses what a text goes on with.

    Attributes:
        length: tokens to a draft, at most.
        is_free: a guess costs nothing, so it may be made to be compared only.
        context_length: tokens of a text behind which it guesses nothing.
        pace: whether it pays.
        drafted, accepted: tokens that were guessed and verified; that were right.
        equal_ties: in 16 bits, verified tokens whose logit another token shared: plain
            decoding may have chosen that one.
        note: why it does not guess, if something forbids it.
    """

    is_free: bool
    context_length = sys.maxsize

    def __init__(self, length: int, flag: str) -> None:
        """Guess up to `length` tokens at once.

        Raises:
            OpenELMError: that is none or too many.
        """
        if type(length) is not int or not 1 <= length <= LONGEST:
            raise OpenELMError(f"{flag} is {length}; it must be 1 to {LONGEST}.")
        self.length = length
        self.pace = Pace(length)
        self.drafted = self.accepted = self.equal_ties = 0
        self.note = ""

    @abstractmethod
    def begin(self, prompt: Sequence[int]) -> None:
        """Read the prompt of a text."""

    @abstractmethod
    def propose(
        self, text: Sequence[int], count: int, drawing: Drawing
    ) -> Draft | None:
        """Guess up to `count` tokens behind the text so far, or None."""

    def expect(self, text: Sequence[int]) -> int | None:
        """Return the next token, if a free guess is at hand."""
        return None

    def settle(self, draft: Sequence[int]) -> None:  # noqa: B027 - not all have to
        """Hear what the last draft was, once it has been computed."""


class LookupDrafter(Drafter):
    """Guesses what followed the last time when the text had the same last tokens."""

    is_free = True

    def __init__(self, length: int) -> None:
        """Guess up to `length` tokens at once.

        Raises:
            OpenELMError: that is none or too many.
        """
        super().__init__(length, "`lookup`")
        self.begin(())

    def begin(self, prompt: Sequence[int]) -> None:
        self._places: dict[tuple[int, ...], int] = {}  # behind each n-gram's last one
        self._read = 0
        self._follows: int | None = None
        self._index(prompt)

    def propose(
        self, text: Sequence[int], count: int, drawing: Drawing
    ) -> Draft | None:
        self._index(text)
        if self._follows is None:
            return None
        # A text that repeats itself is guessed on beyond its end.
        period = len(text) - self._follows
        guesses = [text[self._follows + i % period] for i in range(count)]
        return Draft(mx.array(guesses))

    def expect(self, text: Sequence[int]) -> int | None:
        self._index(text)
        return None if self._follows is None else text[self._follows]

    def _index(self, text: Sequence[int]) -> None:
        for end in range(self._read + 1, len(text) + 1):
            tail = tuple(text[max(0, end - NGRAMS[0]) : end])
            self._follows = None
            for size in NGRAMS:
                if size > len(tail):
                    continue
                ngram = tail[-size:]
                if self._follows is None:
                    self._follows = self._places.get(ngram)
                self._places[ngram] = end
        self._read = len(text)


class ModelDrafter(Drafter):
    """Lets a smaller model of the same vocabulary write ahead."""

    is_free = False

    def __init__(self, model: OpenELM, length: int = 4) -> None:
        """Guess up to `length` tokens at once.

        Raises:
            OpenELMError: that is none or too many.
        """
        super().__init__(length, "The draft's length")
        self.context_length = model.config.max_context_length
        self._model = model
        self._context = Context(model)

    def begin(self, prompt: Sequence[int]) -> None:
        known = self._context.reuse(prompt)
        if len(prompt) < self.context_length:
            self._context.read(self._model, prompt[known:])

    def propose(
        self, text: Sequence[int], count: int, drawing: Drawing
    ) -> Draft | None:
        drawing = copy.copy(drawing)  # the draft's history is its own
        known = self._context.reuse(text)
        hidden = self._context.read(self._model, text[known:])
        tokens: list[mx.array] = []  # (1,) each
        logprobs: list[mx.array] = []  # (1, V) each
        for place in range(count):
            if place:
                hidden = self._model.transformer(tokens[-1][None], self._context.cache)
            shaped = drawing.shape(self._model.head(hidden[:, -1]))
            if drawing.sampling.temp == 0:
                token = choose_tokens(shaped, drawing.sampling)  # (1,)
            else:
                logprobs.append(distribution(shaped, drawing.sampling))
                token = mx.random.categorical(logprobs[-1]).astype(mx.int32)
            drawing.remember(token)
            tokens.append(token)
        return Draft(
            mx.concatenate(tokens), mx.concatenate(logprobs) if logprobs else None
        )

    def settle(self, draft: Sequence[int]) -> None:
        self._context.tokens += draft[:-1]  # the last one was not read


def check_draft(
    model: OpenELM,
    tokenizer: Tokenizer,
    draft_model: OpenELM,
    draft_tokenizer: Tokenizer,
) -> None:
    """Check that a draft model speaks the model's tokens.

    Raises:
        OpenELMError: it has other rows or other pieces.
    """
    rows, draft_rows = model.config.vocab_size, draft_model.config.vocab_size
    if rows != draft_rows:
        raise OpenELMError(
            f"The draft model has a vocabulary of {draft_rows} rows, the model one of "
            f"{rows}; say a `draft_model` with the same vocabulary."
        )
    if draft_tokenizer.model_proto == tokenizer.model_proto:
        return
    pieces, drafts = _pieces(tokenizer), _pieces(draft_tokenizer)
    if pieces != drafts:
        if len(pieces) != len(drafts):
            found = f"{len(drafts)} pieces and not {len(pieces)}"
        else:
            pairs = enumerate(zip(drafts, pieces, strict=True))
            place, (theirs, ours) = next(p for p in pairs if p[1][0] != p[1][1])
            found = f"{theirs!r} and not {ours!r} as piece {place}"
        raise OpenELMError(
            f"The draft model's tokenizer is another one: it has {found}; "
            "say a `draft_model` with the same tokenizer."
        )


def _pieces(tokenizer: Tokenizer) -> list[str]:
    pieces: list[str] = tokenizer.processor.IdToPiece(list(range(tokenizer.vocab_size)))
    return pieces
