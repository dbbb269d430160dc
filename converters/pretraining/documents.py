"""Stream the documents of corpus files, whole or in parts.

Formats: plain text, JSON lines, JSON arrays (all also with gzip or zstd) and parquet.
A file is never completely in memory, unless it is one document.
"""

import errno
import io
import itertools
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import open_text
from mlx_openelm.text.line_ranges import count_lines_before, read_line_range
from mlx_openelm.text.record_files import (
    JSON_SUFFIXES,
    decompress,
    read_start,
    read_values,
)
from mlx_openelm.text.zstd_file import ZstdFile

_SAMPLE_BYTES = 1 << 20  # of text, to estimate the size of the rest
_DECODED_PARTS = 8  # of compressed lines; decoding takes 1 % of the time of cleaning


@dataclass(frozen=True, slots=True)
class Unit:
    """Part `index` of `count` parts of a file, which together are the file.

    A part is a range of bytes of JSON lines, or of row groups of parquet, or of its
    rows if they are fewer; of compressed JSON lines, every `count`-th line. Other files
    have one part.
    """

    path: str
    index: int = 0
    count: int = 1

    def bounds(self, size: int) -> tuple[int, int]:
        """Return the first and the end of this part of `size` things."""
        return self.index * size // self.count, (self.index + 1) * size // self.count


@dataclass(frozen=True, slots=True)
class Damage:
    """A record that cannot be used, or the rest of a file that cannot be read.

    Attributes:
        what: with what to do about it, without the path.
        is_rest: nothing after this can be read.
        is_access: the file cannot be opened or read, whatever it contains.
        record: from 1; None: the file itself is damaged.
        line, column: of the record in a text file, from 1.
        begin: record and line are counted from the first line at or after this byte.
    """

    what: str
    is_rest: bool = False
    is_access: bool = False
    record: int | None = None
    line: int | None = None
    column: int | None = None
    begin: int = 0

    def describe(self, path: str) -> str:
        """Return a message for the user; counts the lines before a range of bytes."""
        if self.record is None:
            return f"{path} {self.what}, or set data.on_damage: skip."
        lines = records = 0
        if self.begin:
            with open(path, "rb") as opened:
                lines, records = count_lines_before(opened, self.begin)
        place = "" if self.line is None else f":{self.line + lines}"
        place += "" if self.column is None else f":{self.column}"
        return (
            f"Record {self.record + records} of {path}{place} {self.what}, or set "
            "data.on_damage: skip."
        )

    def drop(self, path: str, on_damage: str) -> str:
        """Return the reason for which text is dropped.

        Raises:
            DamagedFileError: `on_damage` is "stop".
        """
        if on_damage == "stop":
            raise DamagedFileError(self.describe(path))
        if self.is_rest:
            return f"rest of {path}, damaged"
        return f"damaged records of {path}"


class DamagedFileError(OpenELMError):
    """A file has damage, and `data.on_damage` is "stop"."""


def read_documents(
    unit: Unit,
    *,
    text_key: str = "text",
    document_start: str | None = None,
    start: int = 0,
) -> Iterator[str | Damage]:
    """Yield the documents of a unit, and a `Damage` for each record without one.

    Args:
        text_key: key of the text in JSON records, or its parquet column.
        document_start: regular expression; in plain text, a line that fully matches it
            starts a document. Default: one document per file.
        start: number of items to skip; they are not checked.

    Raises:
        OpenELMError: the package for this format is not installed, or too many files
            are open.
    """
    path = unit.path
    try:
        if is_parquet(path):
            yield from _read_parquet(unit, text_key, start)
        elif _suffix(path) in JSON_SUFFIXES:
            with _open(path) as opened:
                yield from _read_json(unit, opened, text_key, start)
        else:
            with _open(path) as opened, open_text(opened, newline="\n") as text:
                documents = (
                    iter([text.read()])
                    if document_start is None
                    else split_documents(text, document_start)
                )
                yield from itertools.islice(documents, start, None)
    except UnicodeDecodeError as error:
        what = f"cannot be read as UTF-8 text ({error}); save it as UTF-8"
        yield Damage(what, is_rest=True)
    except ValueError as error:  # of `open_text`
        yield Damage(f"cannot be read as UTF-8 text: {error}", is_rest=True)
    except (EOFError, zlib.error, OSError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.EMFILE, errno.ENFILE):
            raise OpenELMError(  # the file is not damaged and must not be skipped
                f"Cannot open {path}: too many files are open, one for each reader of "
                "a process; raise `ulimit -n`, or lower data.readers."
            ) from error
        yield Damage(
            f"is damaged or truncated: {error}; download it again",
            is_rest=True,
            is_access=number is not None,
        )


@dataclass(frozen=True, slots=True)
class FileForm:
    """How much text a file has, and in how many parts it can be read.

    Attributes:
        text_bytes: of large compressed files, estimated from the start.
        cheap_parts: at little cost. Compressed lines and row groups of parquet are
            decoded again for each of their parts.
        most_parts: at most.
    """

    text_bytes: int
    cheap_parts: int = 1
    most_parts: int = 1


def inspect_file(path: str, text_key: str = "text") -> FileForm:
    """Read the start or the footer of a file. Damage is left to `read_documents`."""
    try:
        if is_parquet(path):
            with _open_parquet(path) as opened:
                return _inspect_parquet(opened.metadata, text_key)
        text_bytes = os.path.getsize(path)
        with open(path, "rb") as file:
            opened, cheap_parts = _unpack(path, file), text_bytes
            if not opened.seekable():
                data, cheap_parts = opened.read(_SAMPLE_BYTES), _DECODED_PARTS
                if len(data) == _SAMPLE_BYTES:
                    text_bytes = max(len(data), len(data) * text_bytes // file.tell())
                else:
                    text_bytes = len(data)
                opened = io.BytesIO(data)
            start = read_start(opened)
        lines = not (start.problem or start.is_array or start.is_open_object)
        if _suffix(path) in JSON_SUFFIXES and lines:
            return FileForm(text_bytes, cheap_parts, max(1, text_bytes))
        return FileForm(text_bytes)
    except (EOFError, zlib.error, OSError, ValueError):
        return FileForm(1)


def _inspect_parquet(metadata: Any, text_key: str) -> FileForm:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    sizes = (c.total_uncompressed_size for c in columns if c.path_in_schema == text_key)
    return FileForm(sum(sizes), max(1, len(groups)), max(1, metadata.num_rows))


def is_plain_text(path: str) -> bool:
    """Whether a file is plain text, to which `document_start` applies."""
    return _suffix(path) not in (".parquet", *JSON_SUFFIXES)


def is_compressed(path: str) -> bool:
    """Whether a file's name is that of a file packed with gzip or zstd."""
    return path.lower().endswith((".gz", ".zst"))


def is_parquet(path: str) -> bool:
    """Whether a file's name is that of a parquet file."""
    return _suffix(path) == ".parquet"


def _suffix(path: str) -> str:
    """Return the lower-case suffix of the format, without that of the compression."""
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    return Path(name).suffix


def split_documents(lines: Iterable[str], document_start: str | None) -> Iterator[str]:
    """Split lines before each heading; consecutive headings stay together.

    Without `document_start` all lines are one document. Otherwise documents are
    stripped of surrounding white space, and empty ones are dropped.
    """
    if document_start is None:
        yield "".join(lines)
        return
    try:
        heading = re.compile(document_start)
    except re.error as error:
        raise OpenELMError(
            f"data.document_start is {document_start!r}, which is not a regular "
            f"expression: {error}."
        ) from error
    document: list[str] = []
    has_body = False  # whether text follows the last heading
    for line in lines:
        if heading.fullmatch(line.rstrip("\r\n")):
            if has_body:
                yield from _stripped(document)
                document = []
            has_body = False
        elif line.strip():
            has_body = True
        document.append(line)
    yield from _stripped(document)


def _stripped(lines: list[str]) -> list[str]:
    text = "".join(lines).strip()
    return [text] if text else []


# Bytes ---------------------------------------------------------------------------


def _open(path: str) -> IO[bytes]:
    file = open(path, "rb")  # noqa: SIM115 # closed with what is returned
    try:
        return _unpack(path, file)
    except BaseException:
        file.close()
        raise


def _unpack(path: str, file: io.BufferedReader) -> IO[bytes]:
    if path.lower().endswith(".zst"):
        return io.BufferedReader(ZstdFile(path, file), 1 << 20)
    return decompress(file)


# JSON ----------------------------------------------------------------------------


def _read_json(
    unit: Unit, opened: IO[bytes], text_key: str, start: int
) -> Iterator[str | Damage]:
    """Yield the texts of objects, one per line or in an array."""
    begin, first, every = 0, 0, 1
    if unit.count > 1 and opened.seekable():
        begin, end = unit.bounds(os.path.getsize(unit.path))
        values = read_line_range(opened, begin, end, skip=start)
    else:
        first, every = unit.index, unit.count
        values = read_values(
            opened, skip=first + start * every, every=every, skip_large=True
        )
    for item, read in enumerate(values, start):
        problem = read.problem or _find_problem(read.value, text_key)
        if problem:
            yield Damage(
                problem + _CORRECT,
                is_rest=read.is_last,
                record=first + item * every + 1,
                line=read.line,
                column=read.column,
                begin=begin,
            )
        else:
            yield read.value[text_key]


def _find_problem(value: Any, text_key: str) -> str:
    """Return why a record has no text, or ""."""
    if not isinstance(value, dict):
        return "is not an object"
    if text_key not in value:
        keys = ", ".join(list(value)[:10]) or "none"
        return f"has no {text_key!r}; its keys: {keys}"
    if not isinstance(value[text_key], str):
        return f"has a {text_key!r} that is not a string"
    return ""


_CORRECT = "; correct it or data.text_key"


# Parquet -------------------------------------------------------------------------


def _open_parquet(path: str) -> Any:
    """Return a `ParquetFile`.

    Raises:
        EOFError: it is damaged.
    """
    try:
        import pyarrow  # type: ignore[import-untyped] # it has no stubs
        from pyarrow import parquet
    except ImportError as error:
        raise OpenELMError(
            f"Reading {path} requires the package pyarrow: pip install "
            "'mlx-openelm[torch]'."
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise EOFError(str(error)) from error


def _read_parquet(unit: Unit, text_key: str, start: int) -> Iterator[str | Damage]:
    """Yield a column's texts; row groups before `start` are not read.

    A row group that cannot be decoded yields a `Damage` for each of its further rows.
    """
    with _open_parquet(unit.path) as opened:
        columns = opened.schema_arrow.names
        if text_key not in columns:
            names = ", ".join(columns)
            what = f"has no column {text_key!r}, only {names}; correct data.text_key"
            yield Damage(what, is_rest=True)
            return
        sizes = [
            opened.metadata.row_group(group).num_rows
            for group in range(opened.metadata.num_row_groups)
        ]
        ends = [*itertools.accumulate(sizes)]
        if unit.count <= len(sizes):
            groups = unit.bounds(len(sizes))
            first, end = (ends[group - 1] if group else 0 for group in groups)
        else:
            first, end = unit.bounds(sum(sizes))
        first += start
        for group, size in enumerate(sizes):
            before = ends[group] - size
            if max(first, before) < min(end, ends[group]):
                own = (max(0, first - before), min(end - before, size))
                yield from _read_row_group(opened, group, text_key, before, own)


def _read_row_group(
    opened: Any, group: int, text_key: str, before: int, own: tuple[int, int]
) -> Iterator[str | Damage]:
    """Yield the texts of the `own` rows of a group with `before` rows before it."""
    import pyarrow

    row, (first, end) = 0, own
    try:
        for batch in opened.iter_batches(
            64, row_groups=[group], columns=[text_key], use_threads=False
        ):
            values, stop = batch.column(0), row + batch.num_rows
            for each in range(max(row, first), min(stop, end)):
                yield _read_value(values[each - row], text_key, before + each + 1)
            row = stop
            if row >= end:
                return
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # for example, the file is missing
        what = f"cannot be read ({error})" + _CORRECT
        for lost in range(max(row, first), end):
            yield Damage(what, record=before + lost + 1)


def _read_value(value: Any, text_key: str, record: int) -> str | Damage:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return Damage(f"cannot be read ({error})" + _CORRECT, record=record)
    problem = _find_problem({text_key: text}, text_key)
    return Damage(problem + _CORRECT, record=record) if problem else text
