"""What a recipe's text is as a whole: a tokenizer's training text, packed sequences.

Packing is ours, for corpora too small to pad: the text is held in memory, documents
follow one another, and every sequence is full. Text that is streamed, one piece to a
padded sequence as in OpenELM's pre-training, is the business of `streaming`.
"""

import io
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import sentencepiece

from converters.pretraining.cleaning import repair
from converters.pretraining.corpus_files import (
    DamagedFileError,
    find_files,
    is_plain_text,
    read_documents,
    split_documents,
)
from converters.pretraining.recipe import CorpusRecipe, DataRecipe, TokenizerRecipe
from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.tokenizer import Tokenizer

IGNORED = -100  # a target that is not learnt from


@dataclass(frozen=True, slots=True)
class Corpus:
    """Repaired documents.

    Attributes:
        dropped: what was left out, by reason.
    """

    documents: tuple[str, ...]
    num_files: int
    dropped: Counter[str] = field(default_factory=Counter)


def read_corpora(data: DataRecipe) -> Corpus:
    """Read all that a recipe trains on into memory.

    Raises:
        OpenELMError: a pattern matches nothing, a file is damaged and `on_damage` is
            not to skip it, or the corpora have weights, which mean nothing to text
            that is taken once.
    """
    if len({corpus.weight for corpus in data.corpora}) > 1:
        raise OpenELMError(
            "data.packing takes every corpus once, whatever its weight; leave the "
            "weights out, or packing."
        )
    parts = [
        read_corpus(
            corpus.files,
            exclude=(*data.exclude, *data.heldout),
            document_start=data.document_start,
            text_key=corpus.text_key,
            on_damage=data.on_damage,
        )
        for corpus in list_corpora(data)
    ]
    documents = tuple(text for part in parts for text in part.documents)
    dropped = sum((part.dropped for part in parts), Counter[str]())
    return Corpus(documents, sum(part.num_files for part in parts), dropped)


def list_corpora(data: DataRecipe) -> tuple[CorpusRecipe, ...]:
    """Return a recipe's corpora; `train` is one alone."""
    return data.corpora or (CorpusRecipe(data.train, data.text_key),)


def read_corpus(
    patterns: Sequence[str],
    *,
    exclude: Sequence[str] = (),
    document_start: str | None = None,
    text_key: str = "text",
    on_damage: str = "stop",
) -> Corpus:
    """Read files into memory, in the order of their names.

    Args:
        patterns: as `find_files` takes them; so is `exclude`.
        document_start: as `read_documents` takes it, but it sees the repaired text.

    Raises:
        OpenELMError: a pattern matches nothing, or a file is damaged and `on_damage` is
            not "skip".
    """
    files = find_files(patterns, exclude)
    documents: list[str] = []
    dropped: Counter[str] = Counter()
    for path in files:
        try:
            for document in repair_documents(path, document_start, text_key):
                documents.append(document)  # what is before the damage is kept
        except DamagedFileError:
            if on_damage == "stop":
                raise
            dropped[describe_damage(path)] += 1
    return Corpus(tuple(documents), len(files), dropped)


def describe_damage(path: str) -> str:
    """Return the reason for which a damaged file's rest is left out."""
    return f"rest of {path}, damaged"


def repair_documents(
    path: str, document_start: str | None, text_key: str
) -> Iterator[str]:
    """Yield a file's documents repaired; plain text is repaired before it is cut."""
    for text in read_documents(path, text_key=text_key):
        repaired = repair(text)
        if is_plain_text(path) and document_start is not None:
            yield from split_documents(io.StringIO(repaired, "\n"), document_start)
        else:
            yield repaired


def train_tokenizer(documents: Sequence[str], recipe: TokenizerRecipe) -> Tokenizer:
    """Train SentencePiece BPE with Llama's settings on `documents`, losslessly.

    Same special ids as Llama's, byte fallback, digits apart, one dummy space in front;
    text is not normalised and no white space is removed.

    Raises:
        OpenELMError: SentencePiece cannot make so many, or so few, pieces of this text.
    """
    written = io.BytesIO()
    try:
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
    except (RuntimeError, OSError) as error:  # OSError: "vocab_size must be positive"
        raise OpenELMError(
            f"No tokenizer of {recipe.vocab_size} pieces (tokenizer.vocab_size) can be "
            f"made of this text: {' '.join(str(error).split())}."
        ) from error
    return Tokenizer(written.getvalue())


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Inputs and next-token targets, int64 (B, T); IGNORED is no target."""

    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]


class PackedSequences:
    """Documents in a row, each closed by EOS; every window is begun with BOS.

    Each epoch cuts at another offset, so that borders fall elsewhere. The form is that
    of `evaluate`: N tokens to predict, the first from BOS alone.

    Attributes:
        checksum: tells this stream of tokens from another.
    """

    def __init__(
        self, documents: Sequence[str], tokenizer: Tokenizer, length: int
    ) -> None:
        self.length = length
        self._bos_id = tokenizer.bos_id
        parts = [
            np.array([*tokenizer.encode(text, bos=False), tokenizer.eos_id], np.int32)
            for text in documents
        ]
        self._stream = np.concatenate([np.zeros(0, np.int32), *parts])
        self.num_tokens = len(self._stream)
        self.checksum = zlib.crc32(self._stream.tobytes())
        if len(self) < 1:
            raise OpenELMError(
                f"The corpus has {self.num_tokens} tokens, too few for one sequence of "
                f"{length}."
            )

    def __len__(self) -> int:
        return max(0, len(self._stream) - (self.length - 1)) // self.length

    def batch(self, indices: Sequence[int], seed: int, epoch: int) -> TokenBatch:
        """Return the windows with these places in the order of that epoch."""
        rng = np.random.default_rng([seed, epoch])
        offset = int(rng.integers(self.length)) if epoch else 0
        order = rng.permutation(len(self))
        starts = offset + order[np.asarray(indices)] * self.length
        targets = np.stack([self._stream[s : s + self.length] for s in starts]).astype(
            np.int64
        )
        bos = np.full((len(indices), 1), self._bos_id, np.int64)
        return TokenBatch(np.concatenate([bos, targets[:, :-1]], axis=1), targets)


def step_batch(
    sequences: PackedSequences,
    *,
    step: int,
    batch_size: int,
    seed: int,
    rank: int,
    ranks: int,
) -> TokenBatch:
    """Return this process's share of a step's batch: a function of its arguments.

    A step takes the next `batch_size` sequences; an epoch's last step fills up from the
    next epoch's order.
    """
    share = batch_size // ranks
    first = step * batch_size + rank * share
    parts: list[TokenBatch] = []
    position = first
    while position < first + share:
        epoch, start = divmod(position, len(sequences))
        count = min(first + share - position, len(sequences) - start)
        parts.append(sequences.batch(range(start, start + count), seed, epoch))
        position += count
    return TokenBatch(
        np.concatenate([p.inputs for p in parts]),
        np.concatenate([p.targets for p in parts]),
    )
