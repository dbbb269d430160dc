"""Check that a recipe's corpora are complete, without training."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from converters.pretraining.corpus_files import match_files
from converters.pretraining.documents import (
    Damage,
    Unit,
    inspect_file,
    is_parquet,
    is_plain_text,
    read_documents,
)
from converters.pretraining.recipe import CorpusRecipe, DataRecipe, list_corpora
from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.record_files import open_records, parse_line

_TAIL_BYTES = 1 << 20  # in which the last line of a file begins


@dataclass(frozen=True, slots=True)
class CorpusCheck:
    """What is there of a corpus, and what is not.

    Attributes:
        source: where to get it.
        num_files, num_bytes: of the files that exist.
        missing: files of ranges, and patterns without a match.
        damaged: messages on files that cannot be used.
    """

    name: str
    source: str
    num_files: int
    num_bytes: int
    missing: tuple[str, ...]
    damaged: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        return not self.missing and not self.damaged


@dataclass(frozen=True, slots=True)
class DataCheck:
    """What is there of a recipe's corpora, and what is not."""

    corpora: tuple[CorpusCheck, ...]

    def refuse_incomplete(self) -> None:
        """Raise OpenELMError if a corpus is not complete."""
        names = [check.name for check in self.corpora if not check.is_complete]
        if names:
            raise OpenELMError(
                f"Not complete: {len(names)} of {len(self.corpora)} corpora "
                f"({', '.join(names)}); download what is missing, or edit a copy of "
                "the recipe (mlx-openelm recipes copy)."
            )


def check_data(data: DataRecipe) -> DataCheck:
    """Check each corpus: its files exist, and each begins and ends as it should.

    Compressed files are read at their start only, so a truncated one may pass.

    Raises:
        OpenELMError: the recipe has no text, or the package for a format is missing.
    """
    corpora = [corpus for corpus in list_corpora(data) if corpus.files]
    if not corpora:
        raise OpenELMError("The recipe has no text: set data.train, or pass `data`.")
    if data.heldout:
        heldout = CorpusRecipe(data.heldout, name="held-out", text_key=data.text_key)
        corpora.append(heldout)
    return DataCheck(tuple(map(_check_corpus, corpora)))


def _check_corpus(corpus: CorpusRecipe) -> CorpusCheck:
    paths, missing = match_files(corpus.files)
    damaged = [
        problem
        for path in sorted(paths)
        for problem in _find_problems(path, corpus.text_key)
    ]
    return CorpusCheck(
        corpus.name or ", ".join(corpus.files),
        corpus.source,
        len(paths),
        sum(os.path.getsize(path) for path in paths if os.path.exists(path)),
        missing,
        tuple(damaged),
    )


def _find_problems(path: str, text_key: str) -> Iterator[str]:
    """Yield why a file cannot be used, if its size, start or end show it."""
    try:
        if os.path.getsize(path) == 0:
            yield f"{path} is empty; download it again."
            return
        if is_plain_text(path):
            return
        first = next(read_documents(Unit(path), text_key=text_key), "")
        if isinstance(first, Damage):
            yield first.describe(path)
        elif _is_cut(path):
            yield f"{path} ends in the middle of a record; download it again."
    except OSError as error:
        yield f"Cannot read {path}: {error}; download it again."


def _is_cut(path: str) -> bool:
    """Return whether a file of JSON lines ends in the middle of one."""
    if is_parquet(path) or inspect_file(path).most_parts == 1:
        return False
    with open_records(Path(path)) as opened:
        if not opened.seekable():  # compressed
            return False
        opened.seek(max(0, os.path.getsize(path) - _TAIL_BYTES))
        line = opened.read().rpartition(b"\n")[2]
    return bool(line.strip()) and bool(parse_line(1, line).problem)
