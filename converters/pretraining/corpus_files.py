"""Find corpus files by patterns, and stream their documents.

Formats: plain text, JSON lines, JSON arrays (all also with gzip or zstd) and parquet.
A file is never completely in memory, unless it is one document.
"""

import errno
import fnmatch
import glob
import io
import itertools
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.record_files import JSON_SUFFIXES, open_records, read_values

_MOST_SHOWN = 5  # missing files in a message
_MAX_RANGE = 10_000_000  # files of one range; more is a typing error


class DamagedFileError(OpenELMError):
    """A file cannot be read to its end; the documents before that are valid."""


# Patterns ------------------------------------------------------------------------


def find_files(patterns: Sequence[str], exclude: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the paths of the files that match the patterns, sorted, each file once.

    Args:
        patterns: shell patterns, with `**` for nested folders; `{00..99}` is a range
            of zero-padded numbers, and each of its files must exist.
        exclude: such patterns, matched by file identity, not by path; or patterns of
            file names in any folder.

    Raises:
        OpenELMError: a pattern matches nothing, files of a range are missing, or all
            files are excluded.
    """
    if not patterns:
        raise OpenELMError("The recipe's data names no files.")
    paths: set[str] = set()
    missing: list[str] = []
    for pattern in patterns:
        numbered = expand_ranges(pattern)
        for name in numbered:
            matched = _match(name)
            paths |= matched
            if not matched:
                missing.append(name)
        if len(missing) == len(numbered) == 1:
            raise OpenELMError(f"No file matches {pattern!r}; check the recipe's data.")
    if missing:
        shown = ", ".join(missing[:_MOST_SHOWN])
        more = len(missing) - _MOST_SHOWN
        rest = f" and {more} more" if more > 0 else ""
        raise OpenELMError(
            f"{len(missing)} files of the recipe's data are missing: {shown}{rest}; "
            "download them, or correct the range."
        )
    names = [name for pattern in exclude for name in expand_ranges(pattern)]
    excluded = {_identify(path) for name in names for path in _match(name)}
    kept: dict[object, str] = {}
    for path in sorted(paths):
        named = any(fnmatch.fnmatch(os.path.basename(path), name) for name in names)
        if not named and (file := _identify(path)) not in excluded:
            kept.setdefault(file, path)
    if not kept:
        raise OpenELMError("The recipe's data excludes all of its files.")
    return tuple(kept.values())


def _match(pattern: str) -> set[str]:
    """Return the matching files; an existing path is taken literally."""
    if os.path.isfile(pattern):
        return {pattern}
    matched = glob.glob(pattern, recursive=True)
    return {path for path in matched if not os.path.isdir(path)}


def _identify(path: str) -> object:
    """Return a key that is the same for all paths to a file."""
    try:
        stat = os.stat(path)
    except OSError:  # such as a broken link, which is reported when it is read
        return path
    return stat.st_dev, stat.st_ino


_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand_ranges(pattern: str) -> list[str]:
    """Expand `{first..last}`, both ends included.

    Raises:
        OpenELMError: a range is descending or too long.
    """
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if not 0 <= int(last) - int(first) < _MAX_RANGE:
        raise OpenELMError(
            f"The range {match[0]} in {pattern!r} is descending or too long; write it "
            "as {first..last}."
        )
    head, tails = pattern[: match.start()], expand_ranges(pattern[match.end() :])
    numbers = range(int(first), int(last) + 1)
    return [f"{head}{n:0{len(first)}}{tail}" for n in numbers for tail in tails]


# Documents -----------------------------------------------------------------------


def read_documents(
    path: str,
    *,
    text_key: str = "text",
    document_start: str | None = None,
    start: int = 0,
) -> Iterator[str]:
    """Yield a file's documents from number `start` on; earlier ones are not checked.

    Args:
        text_key: key of the text in JSON records, or its parquet column.
        document_start: regular expression; in plain text, a line that fully matches it
            starts a document. Default: one document per file.

    Raises:
        DamagedFileError: the file cannot be read to its end, or a record has no text.
        OpenELMError: the package for this format is not installed, or too many files
            are open.
    """
    suffix = _suffix(path)
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path, text_key, start)
        elif suffix in JSON_SUFFIXES:
            with _open(path) as opened:
                yield from _read_json(path, opened, text_key, start)
        else:
            with _open(path) as opened, _decoded(opened) as text:
                documents = (
                    iter([text.read()])
                    if document_start is None
                    else split_documents(text, document_start)
                )
                yield from itertools.islice(documents, start, None)
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"Cannot read {path} as UTF-8 text: {error}.") from error
    except (EOFError, zlib.error, OSError) as error:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            raise OpenELMError(  # the file is not damaged and must not be skipped
                f"Cannot open {path}: too many files are open, one for each row of a "
                "batch; raise `ulimit -n`, or data.workers."
            ) from error
        raise DamagedFileError(
            f"{path} is damaged or truncated: {error}; download it again, or set "
            "data.on_damage: skip."
        ) from error


def is_plain_text(path: str) -> bool:
    """Whether a file is plain text, to which `document_start` applies."""
    return _suffix(path) not in (".parquet", *JSON_SUFFIXES)


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
    if path.lower().endswith(".zst"):
        return io.BufferedReader(_ZstdFile(path), 1 << 20)
    return open_records(Path(path))


def _decoded(opened: IO[bytes]) -> io.TextIOWrapper:
    """Decode UTF-8; only a newline ends a line."""
    return io.TextIOWrapper(opened, encoding="utf-8-sig", newline="\n")


class _ZstdFile(io.RawIOBase):
    """Reader of concatenated zstd frames. Unlike zstandard's, it detects truncation."""

    def __init__(self, path: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise _missing("zstandard", path) from error
        self._errors = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None  # the current one
        self._file = open(path, "rb")  # noqa: SIM115 # closed by close()
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            unused = b""
            if self._frame and self._frame.eof:
                unused, self._frame = self._frame.unused_data, None
            compressed = unused or self._file.read(1 << 14)
            if not compressed:
                if self._frame:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(compressed))
            except self._errors as error:
                raise OSError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _missing(package: str, path: str) -> OpenELMError:
    return OpenELMError(
        f"Reading {path} requires the package {package}: pip install "
        "'mlx-openelm[torch]'."
    )


# JSON ----------------------------------------------------------------------------


def _read_json(
    path: str, opened: IO[bytes], text_key: str, start: int
) -> Iterator[str]:
    """Yield the texts of objects, one per line or in an array."""
    for number, read in enumerate(read_values(opened, skip=start), start):
        if read.problem:
            raise _bad_record(f"{path}:{read.place}", number, read.problem)
        yield _get_text(path, number, read.value, text_key)


def _get_text(path: str, number: int, value: Any, text_key: str) -> str:
    if not isinstance(value, dict):
        raise _bad_record(path, number, "is not an object")
    if text_key not in value:
        keys = ", ".join(list(value)[:10]) or "none"
        raise _bad_record(path, number, f"has no {text_key!r}; its keys: {keys}")
    text = value[text_key]
    if not isinstance(text, str):
        raise _bad_record(path, number, f"has a {text_key!r} that is not a string")
    return text


def _bad_record(path: str, number: int, what: str) -> DamagedFileError:
    return DamagedFileError(
        f"Record {number + 1} of {path} {what}; correct it or data.text_key, or set "
        "data.on_damage: skip."
    )


# Parquet -------------------------------------------------------------------------


def _read_parquet(path: str, text_key: str, start: int) -> Iterator[str]:
    """Yield a column's texts; row groups before `start` are not read."""
    try:
        import pyarrow  # type: ignore[import-untyped] # it has no stubs
        from pyarrow import parquet
    except ImportError as error:
        raise _missing("pyarrow", path) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as opened:
            columns = opened.schema_arrow.names
            if text_key not in columns:
                raise DamagedFileError(
                    f"{path} has no column {text_key!r}, only {', '.join(columns)}; "
                    "correct data.text_key, or set data.on_damage: skip."
                )
            for group in range(opened.metadata.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                if number + rows <= start:
                    number += rows
                    continue
                for batch in opened.iter_batches(
                    256, row_groups=[group], columns=[text_key], use_threads=False
                ):
                    for text in batch.column(0).to_pylist():
                        if number >= start:
                            yield _get_text(path, number, {text_key: text}, text_key)
                        number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # for example, the file is missing
        raise _bad_record(path, number, f"cannot be read ({error})") from error
