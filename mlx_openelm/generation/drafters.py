"""Draft sources for speculative decoding: prompt lookup, or a smaller model."""

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.decoding import Context, Sampler
from mlx_openelm.generation.draft_pacing import Pace
from mlx_openelm.generation.sampling import choose_tokens, distribution
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.tuning import DEFAULT, Tuning

LONGEST = 32  # tokens per draft
NGRAMS = (4, 3, 2)  # lengths of the tail that is looked up, longest first


@dataclass(frozen=True, slots=True)
class Draft:
    """Draft tokens (k,), k >= 1.

    Attributes:
        logprobs: the distributions that they were drawn from, (k, V), float32; None:
            they are not sampled, so each has probability 1.
    """

    tokens: mx.array
    logprobs: mx.array | None = None

    @property
    def ids(self) -> list[int]:
        ids: list[int] = self.tokens.tolist()  # type: ignore[assignment] # not a scalar
        return ids


class Drafter(ABC):
    """Drafts the next tokens of a text.

    Attributes:
        length: maximum number of tokens per draft.
        is_free: a draft costs no time, so it may be made only to measure its accuracy.
        context_length: length of a text beyond which it drafts nothing.
        pace: chooses the draft length.
        drafted, accepted: numbers of verified and of accepted draft tokens.
        equal_ties: in 16 bits, verified tokens whose logit equals another token's:
            plain decoding may have chosen that one.
        note: why it cannot draft, or empty.
    """

    is_free: bool
    context_length = sys.maxsize

    def __init__(self, length: int, flag: str) -> None:
        """Draft up to `length` tokens at once.

        Raises:
            OpenELMError: `length` is not 1 to 32.
        """
        if type(length) is not int or not 1 <= length <= LONGEST:
            raise OpenELMError(f"{flag} is {length}; it must be 1 to {LONGEST}.")
        self.length = length
        self.pace = Pace(length)
        self.drafted = self.accepted = self.equal_ties = 0
        self.note = ""

    @abstractmethod
    def begin(self, prompt: Sequence[int]) -> None:
        """Start a text with this prompt."""

    @abstractmethod
    def propose(
        self, text: Sequence[int], count: int, sampler: Sampler
    ) -> Draft | None:
        """Draft up to `count` tokens to continue the text, or return None."""

    def peek(self, text: Sequence[int]) -> int | None:
        """Return the next token if a free draft has one."""
        return None

    def record(self, draft: Sequence[int]) -> None:  # noqa: B027 - optional
        """Record the ids of the last draft, after its evaluation."""


class LookupDrafter(Drafter):
    """Drafts what followed the last earlier occurrence of the text's last tokens."""

    is_free = True

    def __init__(self, length: int) -> None:
        """Draft up to `length` tokens at once.

        Raises:
            OpenELMError: `length` is not 1 to 32.
        """
        super().__init__(length, "`lookup`")
        self.begin(())

    def begin(self, prompt: Sequence[int]) -> None:
        self._places: dict[tuple[int, ...], int] = {}  # end of each n-gram's last match
        self._read = 0
        self._follows: int | None = None
        self._index(prompt)

    def propose(
        self, text: Sequence[int], count: int, sampler: Sampler
    ) -> Draft | None:
        self._index(text)
        if self._follows is None:
            return None
        # A draft that reaches the end of the text repeats from the match.
        period = len(text) - self._follows
        ids = [text[self._follows + i % period] for i in range(count)]
        return Draft(mx.array(ids))

    def peek(self, text: Sequence[int]) -> int | None:
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
    """Drafts with a smaller model of the same vocabulary."""

    is_free = False

    def __init__(
        self, model: OpenELM, length: int = 4, tuning: Tuning = DEFAULT
    ) -> None:
        """Draft up to `length` tokens at once.

        Raises:
            OpenELMError: `length` is not 1 to 32.
        """
        super().__init__(length, "The draft's length")
        self.context_length = model.config.max_context_length
        self._model = model
        self._context = Context(model, tuning=tuning)

    def begin(self, prompt: Sequence[int]) -> None:
        reused = self._context.reuse(prompt)
        if len(prompt) < self.context_length:
            self._context.read(self._model, prompt[reused:])

    def propose(
        self, text: Sequence[int], count: int, sampler: Sampler
    ) -> Draft | None:
        sampler = copy.copy(sampler)  # the draft has its own history
        reused = self._context.reuse(text)
        logits = self._context.extend(self._model, text[reused:])
        step, cache = self._context.step(self._model), self._context.cache
        tokens: list[mx.array] = []  # (1,) each
        logprobs: list[mx.array] = []  # (1, V) each
        for place in range(count):
            if place:
                logits = step(tokens[-1], cache)
            shaped = sampler.shape(sampler.mask(logits))
            if sampler.sampling.temp == 0:
                token = choose_tokens(shaped, sampler.sampling)  # (1,)
            else:
                logprobs.append(distribution(shaped, sampler.sampling))
                token = mx.random.categorical(logprobs[-1]).astype(mx.int32)
            sampler.remember(token)
            tokens.append(token)
        return Draft(
            mx.concatenate(tokens), mx.concatenate(logprobs) if logprobs else None
        )

    def record(self, draft: Sequence[int]) -> None:
        self._context.tokens += draft[:-1]  # the last one was not processed


def check_draft(
    model: OpenELM,
    tokenizer: Tokenizer,
    draft_model: OpenELM,
    draft_tokenizer: Tokenizer,
) -> None:
    """Check that a draft model has the model's vocabulary.

    Raises:
        OpenELMError: the size of the vocabulary or a token piece differs.
    """
    rows, draft_rows = model.config.vocab_size, draft_model.config.vocab_size
    if rows != draft_rows:
        raise OpenELMError(
            f"The draft model's vocabulary has {draft_rows} rows, the model's {rows}; "
            "choose a `draft_model` with the same vocabulary."
        )
    same_pieces = draft_tokenizer.model_proto == tokenizer.model_proto
    if same_pieces and draft_tokenizer.added == tokenizer.added:
        return
    pieces, drafts = _pieces(tokenizer), _pieces(draft_tokenizer)
    if pieces != drafts:
        if len(pieces) != len(drafts):
            difference = f"{len(drafts)} pieces, not {len(pieces)}"
        else:
            pairs = enumerate(zip(drafts, pieces, strict=True))
            place, (theirs, ours) = next(p for p in pairs if p[1][0] != p[1][1])
            difference = f"piece {place} {theirs!r}, not {ours!r}"
        raise OpenELMError(
            "The draft model's tokenizer differs from the model's: it has "
            f"{difference}; choose a `draft_model` with the same tokenizer."
        )


def _pieces(tokenizer: Tokenizer) -> list[str]:
    return list(map(tokenizer.piece, range(tokenizer.num_ids)))
