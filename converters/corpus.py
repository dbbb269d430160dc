"""Documents become token sequences, as OpenELM's pre-training did it.

The published pipeline (CoreNet's OpenELM recipes): repair the text with ftfy, cut a
document into pieces of 2048 words, drop short ones, put BOS in front and EOS behind,
one piece to a padded sequence. `packing` is ours, for corpora too small to pad.
"""

import fnmatch
import glob
import io
import itertools
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import ftfy
import numpy as np
import numpy.typing as npt
import sentencepiece

from mlx_openelm.errors import OpenELMError
from mlx_openelm.pretrain_recipe import DataRecipe, TokenizerRecipe
from mlx_openelm.tokenizer import Tokenizer

IGNORED = -100  # a target that is not learnt from
Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Clean documents, and how many pieces were dropped for which reason."""

    documents: tuple[str, ...]
    num_files: int


def read_corpus(
    patterns: Sequence[str],
    *,
    exclude: Sequence[str] = (),
    document_start: str | None = None,
) -> Corpus:
    """Read text files, in the order of their names.

    Args:
        patterns: file patterns; `exclude` are patterns of full paths or file names.
        document_start: a regular expression; a line that it matches whole begins a new
            document. Without it, a file is a document.

    Raises:
        OpenELMError: a pattern matches nothing, or a file is not UTF-8 text.
    """
    paths: set[str] = set()
    for pattern in patterns:
        matched = glob.glob(pattern, recursive=True)
        if not matched:
            raise OpenELMError(f"No file matches {pattern!r}; check the recipe's data.")
        paths |= set(matched)
    kept = sorted(
        path
        for path in paths
        if not any(
            fnmatch.fnmatch(path, x) or fnmatch.fnmatch(Path(path).name, x)
            for x in exclude
        )
    )
    if not kept:
        raise OpenELMError("The recipe's data excludes every file that it names.")
    documents: list[str] = []
    for path in kept:
        try:
            text = Path(path).read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise OpenELMError(f"Cannot read {path} as UTF-8 text: {error}.") from error
        documents += _split_documents(clean(text), document_start)
    return Corpus(tuple(documents), len(kept))


def clean(text: str) -> str:
    """Repair text as CoreNet does: ftfy with its default fixes, then NFC."""
    return ftfy.fix_text(text, normalization="NFC")


def _split_documents(text: str, document_start: str | None) -> list[str]:
    """Cut before each heading; headings in a row stay together."""
    if document_start is None:
        return [text]
    bounds, heading_end = [0], 0
    for heading in re.finditer(rf"^(?:{document_start})$", text, re.MULTILINE):
        if text[heading_end : heading.start()].strip():
            bounds.append(heading.start())
        heading_end = heading.end()
    bounds.append(len(text))
    parts = (text[a:b].strip() for a, b in itertools.pairwise(bounds))
    return [part for part in parts if part]


def train_tokenizer(documents: Sequence[str], recipe: TokenizerRecipe) -> Tokenizer:
    """Train SentencePiece BPE with Llama's settings on `documents`, losslessly.

    Same special ids as Llama's, byte fallback, digits apart, one dummy space in front;
    text is not normalised and no white space is removed.
    """
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
            line for text in documents for line in text.split("\n") if line
        ),
        model_writer=written,
        model_type="bpe",
        vocab_size=recipe.vocab_size,
        character_coverage=0.9999,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 16,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return Tokenizer(written.getvalue())


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs and next-token targets, int64 (B, T); IGNORED is no target."""

    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]


class PaddedSequences:
    """One piece of a document to a sequence, as in OpenELM's pre-training.

    Attributes:
        dropped: pieces that were left out, counted by reason.
    """

    def __init__(
        self,
        documents: Sequence[str],
        tokenizer: Tokenizer,
        recipe: DataRecipe,
        length: int,
    ) -> None:
        self.length = length
        self.dropped: Counter[str] = Counter()
        self._sequences = [
            ids
            for document in documents
            for ids in self._tokenize(document, tokenizer, recipe)
        ]
        if not self._sequences:
            raise OpenELMError(
                f"No piece of the corpus is long enough: {dict(self.dropped)} dropped; "
                "lower data.min_tokens and data.min_characters, or set data.packing."
            )
        self.num_tokens = sum(len(ids) - 1 for ids in self._sequences)

    def __len__(self) -> int:
        return len(self._sequences)

    def _tokenize(
        self, document: str, tokenizer: Tokenizer, recipe: DataRecipe
    ) -> Iterator[Tokens]:
        words = document.split(" ")
        for start in range(0, len(words), recipe.words_per_piece):
            piece = " ".join(words[start : start + recipe.words_per_piece])
            if _count_letters(piece) < recipe.min_characters:
                self.dropped["too few characters"] += 1
                continue
            ids = [*tokenizer.encode(piece), tokenizer.eos_id]
            if len(ids) < recipe.min_tokens:
                self.dropped["too few tokens"] += 1
                continue
            yield np.array(ids[: self.length + 1], np.int32)

    def batch(self, indices: Sequence[int], seed: int, epoch: int) -> Batch:
        """Return the sequences with these places in the order of that epoch."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self))
        inputs = np.zeros((len(indices), self.length), np.int64)
        targets = np.full((len(indices), self.length), IGNORED, np.int64)
        for row, index in enumerate(indices):
            ids = self._sequences[order[index]]
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:]
        return Batch(inputs, targets)


class PackedSequences:
    """Documents in a row, each closed by EOS; every window is begun with BOS.

    Each epoch cuts at another offset, so that borders fall elsewhere. The form is that
    of `evaluate --text`: N tokens to predict, the first from BOS alone.
    """

    dropped: ClassVar[Counter[str]] = Counter()  # nothing is

    def __init__(
        self, documents: Sequence[str], tokenizer: Tokenizer, length: int
    ) -> None:
        self.length = length
        self._bos_id = tokenizer.bos_id
        parts = [
            np.array([*tokenizer.encode(text, bos=False), tokenizer.eos_id], np.int32)
            for text in documents
        ]
        self._stream = np.concatenate(parts)
        self.num_tokens = len(self._stream)
        if len(self) < 1:
            raise OpenELMError(
                f"The corpus has {self.num_tokens} tokens, too few for one sequence of "
                f"{length}."
            )

    def __len__(self) -> int:
        return (len(self._stream) - (self.length - 1)) // self.length

    def batch(self, indices: Sequence[int], seed: int, epoch: int) -> Batch:
        """Return the windows with these places in the order of that epoch."""
        rng = np.random.default_rng([seed, epoch])
        offset = int(rng.integers(self.length)) if epoch else 0
        order = rng.permutation(len(self))
        starts = offset + order[np.asarray(indices)] * self.length
        targets = np.stack([self._stream[s : s + self.length] for s in starts]).astype(
            np.int64
        )
        bos = np.full((len(indices), 1), self._bos_id, np.int64)
        return Batch(np.concatenate([bos, targets[:, :-1]], axis=1), targets)


Sequences = PaddedSequences | PackedSequences


def step_batch(
    sequences: Sequences,
    *,
    step: int,
    batch_size: int,
    seed: int,
    rank: int,
    ranks: int,
) -> Batch:
    """Return this process's share of a step's batch: a function of its arguments.

    A step takes the next `batch_size` sequences; an epoch's last step fills up from the
    next epoch's order.
    """
    share = batch_size // ranks
    first = step * batch_size + rank * share
    parts: list[Batch] = []
    position = first
    while position < first + share:
        epoch, start = divmod(position, len(sequences))
        count = min(first + share - position, len(sequences) - start)
        parts.append(sequences.batch(range(start, start + count), seed, epoch))
        position += count
    return Batch(
        np.concatenate([p.inputs for p in parts]),
        np.concatenate([p.targets for p in parts]),
    )


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _count_letters(text: str) -> int:
    """Characters left when lower-cased, without punctuation, white space collapsed."""
    return len(" ".join(text.lower().translate(_PUNCTUATION).split()))
