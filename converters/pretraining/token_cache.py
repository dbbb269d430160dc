"""Cache of tokenized corpus units, memory-mapped from disk.

A cache file belongs to one unit of a file, tokenizer, set of rules and version of ftfy;
its name is a hash of these. It contains the tokens of all pieces, a table of the
pieces, a table of the documents, and a JSON description with damages and a checksum.
Files are replaced atomically, so no process reads an incomplete one.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import numpy.typing as npt

from converters.pretraining.cleaning import (
    FEW_CHARACTERS,
    FEW_TOKENS,
    DocumentPiece,
    Rules,
    make_pieces,
)
from converters.pretraining.documents import (
    Damage,
    DamagedFileError,
    Unit,
    read_documents,
)
from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import parse_json
from mlx_openelm.storage.staging import replaced_file
from mlx_openelm.text.tokenizer import Tokenizer

_VERSION = 2
_MAGIC = b"OELMTOKS"
_TAIL = struct.Struct("<QI8s")  # bytes of the description, its checksum, the magic
_REASONS = ("", FEW_CHARACTERS, FEW_TOKENS)
_PIECE = np.dtype(
    [("end", "<u8"), ("num_cut", "<u4"), ("checksum", "<u4"), ("reason", "<u4")]
)

_DOCUMENT = np.dtype([("end", "<u8"), ("num_characters", "<u8")])  # end: of its pieces


@dataclass(frozen=True, slots=True)
class CorpusUnit:
    """A unit of a file and everything that determines its tokens."""

    unit: Unit
    text_key: str
    document_start: str | None
    rules: Rules
    tokenizer: Tokenizer

    @property
    def path(self) -> str:
        return self.unit.path

    def read(self, start: int = 0) -> Iterator[str | Damage]:
        """Yield the unit's documents from item `start` on, as `read_documents`."""
        return read_documents(
            self.unit,
            text_key=self.text_key,
            document_start=self.document_start,
            start=start,
        )


@dataclass(frozen=True, slots=True)
class CachedDocument:
    """A document of a cached unit, by its number; its length is in characters."""

    cached: "CachedUnit"
    number: int

    def __len__(self) -> int:
        return self.cached.count_characters(self.number)

    def pieces(self, start: int = 0) -> Iterator[DocumentPiece]:
        """Yield the pieces that `make_pieces` yields for the document's text."""
        return self.cached.pieces(self.number, start)


class CachedUnit:
    """The tokens of a unit, which is tokenized and cached first if needed.

    Raises:
        OpenELMError: the folder cannot be written.
    """

    def __init__(self, folder: str, source: CorpusUnit) -> None:
        self._folder, self._source = Path(folder), source
        self.path = source.path
        self._access: Damage | None = None  # why the file cannot be read now
        try:
            self._open()
        except _InaccessibleError as error:
            self._access = error.damage

    def read(self, start: int = 0) -> Iterator[CachedDocument | Damage]:
        """Yield the items from number `start` on, as `read_documents`."""
        if self._access is not None:
            yield self._access
            return
        number = start - sum(item < start for item in self._damages)
        for item in range(start, len(self._documents) + len(self._damages)):
            damage = self._damages.get(item)
            if damage is not None:
                yield damage
            else:
                yield CachedDocument(self, number)
                number += 1

    def count_characters(self, number: int) -> int:
        return int(self._documents[number]["num_characters"])

    def pieces(self, number: int, start: int = 0) -> Iterator[DocumentPiece]:
        """Yield the pieces of a document; a damaged cache is written again."""
        first = int(self._documents[number - 1]["end"]) if number else 0
        for i in range(first + start, int(self._documents[number]["end"])):
            piece = self._read_piece(i)
            if piece is None:
                self._rewrite()
                piece = self._read_piece(i)
            if piece is None:
                raise OpenELMError(
                    f"The tokens of {self._source.path} in {self._folder} are damaged "
                    "again after writing them; use another data.cache."
                )
            yield piece

    def _read_piece(self, i: int) -> DocumentPiece | None:
        entry = self._table[i]
        begin = int(self._table[i - 1]["end"]) if i else 0
        tokens = np.asarray(self._tokens[begin : int(entry["end"])])
        if zlib.crc32(tokens.tobytes()) != entry["checksum"]:
            return None
        reason = _REASONS[int(entry["reason"])]
        return DocumentPiece(tokens.astype(np.int32), reason, int(entry["num_cut"]))

    def _open(self, *, again: bool = False) -> None:
        """Map the cache file; write it if it is missing or damaged, or if `again`."""
        path = self._folder / f"{_hash_source(self._source)}.tokens"
        try:
            if again or not self._map(path):
                self._folder.mkdir(parents=True, exist_ok=True)
                with _lock(path):
                    # Another process may have written it in the meantime.
                    if not self._map(path) or (again and not self._is_valid()):
                        _write(path, self._source)
                        self._map(path)
        except OSError as error:
            raise OpenELMError(
                f"Cannot write the tokens of {self._source.path} to {self._folder}: "
                f"{error}; free some space, or use another data.cache."
            ) from error

    def _rewrite(self) -> None:
        try:
            self._open(again=True)
        except _InaccessibleError as error:
            raise DamagedFileError(error.damage.describe(self.path)) from error

    def _is_valid(self) -> bool:
        return all(self._read_piece(i) is not None for i in range(len(self._table)))

    def _map(self, path: Path) -> bool:
        """Map a file; return whether it exists and is consistent."""
        if not path.is_file() or path.stat().st_size < _TAIL.size:
            return False
        stored = np.memmap(path, np.uint8, mode="r")
        size, checksum, magic = _TAIL.unpack(stored[-_TAIL.size :].tobytes())
        body = len(stored) - _TAIL.size
        if magic != _MAGIC or size > body:
            return False
        text = stored[body - size : body].tobytes()
        if zlib.crc32(text) != checksum:
            return False
        about: dict[str, Any] = parse_json(text)
        width = np.dtype(about["dtype"])
        ends = np.cumsum(
            [
                about["num_tokens"] * width.itemsize,
                about["num_pieces"] * _PIECE.itemsize,
                about["num_documents"] * _DOCUMENT.itemsize,
            ]
        )
        tables = stored[ends[0] : ends[2]]
        if ends[2] + size != body or zlib.crc32(tables.tobytes()) != about["checksum"]:
            return False
        self._tokens: npt.NDArray[Any] = stored[: ends[0]].view(width)
        self._table = stored[ends[0] : ends[1]].copy().view(_PIECE)
        self._documents = stored[ends[1] : ends[2]].copy().view(_DOCUMENT)
        self._damages = {item: Damage(**fields) for item, fields in about["damages"]}
        return True


class _InaccessibleError(Exception):
    """A file cannot be opened or read now."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(damage)
        self.damage = damage


def _hash_source(source: CorpusUnit) -> str:
    """Hash everything that determines the tokens; the file by path, size and time."""
    try:
        stat = os.stat(source.path)
    except OSError as error:
        what = f"is damaged or truncated: {error}; download it again"
        raise _InaccessibleError(Damage(what, is_rest=True, is_access=True)) from error
    rules = source.rules
    parts = [
        *(_VERSION, ftfy.__version__),
        *(os.path.abspath(source.path), stat.st_size, stat.st_mtime_ns),
        *(source.unit.index, source.unit.count),
        *(source.text_key, source.document_start),
        hashlib.sha256(source.tokenizer.model_proto).hexdigest(),
        *(rules.words_per_piece, rules.min_characters, rules.min_tokens, rules.length),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lock a cache file against other processes, until this one releases it or ends.

    All files of a folder share one lock file, each with its own byte.
    """
    with (path.parent / "lock").open("a+b") as opened:
        fcntl.lockf(opened, fcntl.LOCK_EX, 1, int(path.stem[:12], 16))
        yield


def _write(path: Path, source: CorpusUnit) -> None:
    """Read and tokenize a unit, and write its cache file atomically."""
    few = source.tokenizer.vocab_size <= 1 << 16
    width = np.dtype("<u2" if few else "<u4")
    table: list[tuple[int, int, int, int]] = []
    documents: list[tuple[int, int]] = []
    damages: list[tuple[int, dict[str, Any]]] = []
    num_tokens = 0
    with replaced_file(path) as part, part.open("wb") as written:
        for number, item in enumerate(source.read()):
            if isinstance(item, Damage):
                if item.is_access:
                    raise _InaccessibleError(item)
                damages.append((number, asdict(item)))
                continue
            for piece in make_pieces(item, source.tokenizer, source.rules):
                stored = piece.tokens.astype(width).tobytes()
                written.write(stored)
                num_tokens += len(piece.tokens)
                reason = _REASONS.index(piece.dropped)
                table.append((num_tokens, piece.num_cut, zlib.crc32(stored), reason))
            documents.append((len(table), len(item)))
        tables = (
            np.array(table, _PIECE).tobytes() + np.array(documents, _DOCUMENT).tobytes()
        )
        about = {
            "dtype": width.str,
            "num_tokens": num_tokens,
            "num_pieces": len(table),
            "num_documents": len(documents),
            "damages": damages,
            "checksum": zlib.crc32(tables),
            "source": source.path,  # for debugging
        }
        text = json.dumps(about).encode()
        written.write(tables + text)
        written.write(_TAIL.pack(len(text), zlib.crc32(text), _MAGIC))
