"""Training text in memory: packed sequences, and training of a tokenizer.

Packing concatenates documents into full sequences, for corpora that are too small to
pad. CoreNet does not have it; `streams` reads text as in OpenELM's pre-training, one
piece per padded sequence.
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
from converters.pretraining.corpus_files import find_files
from converters.pretraining.documents import (
    Damage,
    Unit,
    is_plain_text,
    read_documents,
    split_documents,
)
from converters.pretraining.recipe import DataRecipe, TokenizerRecipe, list_corpora
from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import count_of
from mlx_openelm.text.tokenizer import Tokenizer

IGNORED = -100  # a target without a loss


@dataclass(frozen=True, slots=True)
class Corpus:
    """Repaired documents.

    Attributes:
        dropped: number of dropped items by reason.
    """

    documents: tuple[str, ...]
    num_files: int
    dropped: Counter[str] = field(default_factory=Counter)


def read_corpora(data: DataRecipe) -> Corpus:
    """Read all training text of a recipe into memory.

    Raises:
        OpenELMError: a pattern matches nothing, or a file is damaged and `on_damage` is
            "stop".
    """
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
        patterns: as for `find_files`; so is `exclude`.
        document_start: as for `read_documents`, but matched in the repaired text.

    Raises:
        OpenELMError: a pattern matches nothing, or a file is damaged and `on_damage` is
            not "skip".
    """
    files = find_files(patterns, exclude)
    documents: list[str] = []
    dropped: Counter[str] = Counter()
    for path in files:
        for item in repair_documents(path, document_start, text_key):
            if isinstance(item, Damage):
                dropped[item.drop(path, on_damage)] += 1
            else:
                documents.append(item)
    return Corpus(tuple(documents), len(files), dropped)


def repair_documents(
    path: str, document_start: str | None, text_key: str
) -> Iterator[str | Damage]:
    """Yield a file's repaired documents; plain text is split after the repair."""
    for item in read_documents(Unit(path), text_key=text_key):
        if isinstance(item, Damage):
            yield item
            continue
        repaired = repair(item)
        if is_plain_text(path) and document_start is not None:
            yield from split_documents(io.StringIO(repaired, "\n"), document_start)
        else:
            yield repaired


def train_tokenizer(documents: Sequence[str], recipe: TokenizerRecipe) -> Tokenizer:
    """Train a lossless SentencePiece BPE tokenizer with Llama's settings.

    Llama's special ids, byte fallback, split digits, a dummy prefix space; no
    normalisation, and all white space is kept.

    Raises:
        OpenELMError: SentencePiece cannot train this number of pieces on the text.
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
        # After the place in SentencePiece's code and the condition, in brackets.
        reason = " ".join(str(error).rpartition("] ")[2].split()).rstrip(".")
        raise OpenELMError(
            f"Cannot train a tokenizer with {recipe.vocab_size} pieces "
            f"(tokenizer.vocab_size) on this text: {reason}."
        ) from error
    return Tokenizer(written.getvalue())


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Inputs and next-token targets, int64 (B, T); IGNORED where there is no target."""

    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]


class PackedSequences:
    """Windows of concatenated documents, each document ending with EOS.

    Each window starts with BOS and has `length` targets, as in `evaluate`. Each epoch
    splits the stream at another offset.

    Attributes:
        checksum: of the token stream.
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
                f"The corpus has {count_of(self.num_tokens, 'token')}, too few for one "
                f"sequence of {length}."
            )

    def __len__(self) -> int:
        return max(0, len(self._stream) - (self.length - 1)) // self.length

    def batch(self, indices: Sequence[int], seed: int, epoch: int) -> TokenBatch:
        """Return the windows at these positions of the epoch's order."""
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
    """Return this process's share of a step's batch.

    A step uses the next `batch_size` sequences; the last batch of an epoch is completed
    from the next one.
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
