"""A document becomes pieces of tokens by the rules of OpenELM's pre-training.

The published pipeline, in this order: cut at single spaces into pieces of 2048 words;
drop a piece of under 200 characters; repair the text with ftfy; put BOS in front and
EOS behind; drop it under 256 tokens; keep the first 2049, for 2048 to be predicted.
"""

import string
from collections.abc import Iterator
from dataclasses import dataclass

import ftfy
import numpy as np
import numpy.typing as npt

from converters.pretraining.recipe import DataRecipe
from mlx_openelm.text.tokenizer import Tokenizer

Tokens = npt.NDArray[np.int32]

FEW_CHARACTERS, FEW_TOKENS = "too few characters", "too few tokens"
NOTHING: Tokens = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the rules leave open: numbers of words, characters and tokens.

    Attributes:
        length: tokens of a sequence that are predicted; one more is kept.
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
        tokens: BOS, the text's and EOS, cut to the sequence; none if it was dropped.
        dropped: why, or nothing.
        num_cut: the tokens behind those kept.
    """

    tokens: Tokens
    dropped: str = ""
    num_cut: int = 0


def make_pieces(
    document: str, tokenizer: Tokenizer, rules: Rules, *, start: int = 0
) -> Iterator[DocumentPiece]:
    """Yield all pieces of a document from number `start` on, the dropped ones too."""
    words = document.split(" ")
    step = rules.words_per_piece
    for first in range(start * step, len(words), step):
        yield _make_piece(" ".join(words[first : first + step]), tokenizer, rules)


def _make_piece(text: str, tokenizer: Tokenizer, rules: Rules) -> DocumentPiece:
    if count_characters(text) < rules.min_characters:  # of the text as it came
        return DocumentPiece(NOTHING, FEW_CHARACTERS)
    ids = tokenize(repair(text), tokenizer)
    if len(ids) < rules.min_tokens:
        return DocumentPiece(NOTHING, FEW_TOKENS)
    kept = ids[: rules.length + 1]
    return DocumentPiece(np.array(kept, np.int32), num_cut=len(ids) - len(kept))


def repair(text: str) -> str:
    """Repair text as CoreNet does: ftfy with its default fixes, then NFC."""
    return ftfy.fix_text(text, normalization="NFC")


def tokenize(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return BOS, the text's ids and EOS."""
    return [*tokenizer.encode(text), tokenizer.eos_id]


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def count_characters(text: str) -> int:
    """Characters left when lower-cased, without punctuation, white space collapsed."""
    return len(" ".join(text.lower().translate(_PUNCTUATION).split()))
