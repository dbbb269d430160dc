"""Split a document into pieces of tokens by the rules of OpenELM's pre-training.

The published pipeline, in this order: split at single spaces into pieces of 2048 words;
drop pieces below 200 characters; repair the text with ftfy; add BOS before and EOS
after it; drop pieces below 256 tokens; keep the first 2049 tokens (2048 targets).
"""

import string
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.pretraining.recipe import DataRecipe
from mlx_openelm.text.repair import repair
from mlx_openelm.text.tokenizer import Tokenizer

Tokens = npt.NDArray[np.int32]

FEW_CHARACTERS, FEW_TOKENS = "too few characters", "too few tokens"
NOTHING: Tokens = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Rules:
    """Parameters of the rules.

    Attributes:
        length: targets of a sequence; `length` + 1 tokens are kept.
    """

    words_per_piece: int
    min_characters: int
    min_tokens: int
    length: int

    @classmethod
    def of(cls, data: DataRecipe, length: int) -> "Rules":
        """Return a recipe's rules for sequences of `length`."""
        return cls(data.words_per_piece, data.min_characters, data.min_tokens, length)


@dataclass(frozen=True, slots=True)
class DocumentPiece:
    """One piece of a document.

    Attributes:
        tokens: BOS, the text's tokens and EOS, truncated; empty if it was dropped.
        dropped: the reason for dropping it, or "".
        num_cut: number of truncated tokens.
    """

    tokens: Tokens
    dropped: str = ""
    num_cut: int = 0


def make_pieces(
    document: str, tokenizer: Tokenizer, rules: Rules, *, start: int = 0
) -> Iterator[DocumentPiece]:
    """Yield the pieces of a document from number `start` on, including dropped ones."""
    words = document.split(" ")
    step = rules.words_per_piece
    for first in range(start * step, len(words), step):
        yield _make_piece(" ".join(words[first : first + step]), tokenizer, rules)


def _make_piece(text: str, tokenizer: Tokenizer, rules: Rules) -> DocumentPiece:
    if count_characters(text) < rules.min_characters:  # before the repair
        return DocumentPiece(NOTHING, FEW_CHARACTERS)
    ids = tokenize(repair(text), tokenizer)
    if len(ids) < rules.min_tokens:
        return DocumentPiece(NOTHING, FEW_TOKENS)
    kept = ids[: rules.length + 1]
    return DocumentPiece(np.array(kept, np.int32), num_cut=len(ids) - len(kept))


def tokenize(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return BOS, the text's ids and EOS."""
    return [*tokenizer.encode(text), tokenizer.eos_id]


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def count_characters(text: str) -> int:
    """Count characters without punctuation, with collapsed white space."""
    return len(" ".join(text.lower().translate(_PUNCTUATION).split()))
