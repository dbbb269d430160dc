"""Files of JSON values: one per line or one array, plain or compressed with gzip.

Reads fine-tuning data, tasks, prompts and pre-training corpora. A file is read in
chunks and is never in memory as a whole. Values and problems have a line and column;
the caller can stop at the first problem or collect all of them.
"""

import codecs
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")

# Raised if a file is missing, damaged or truncated, or its name contains a NUL
READ_ERRORS = (OSError, EOFError, zlib.error, ValueError)

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 16  # bytes
# An array of objects or strings; a line that starts with another array is one value.
_ARRAY = re.compile(rb'\s*\[(\s*[{"\]]|[ \t\r]*\n|\s*$)')
_NOT_BLANK = re.compile(r"[^ \t\r\n]")  # JSON's white space
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class JsonValue:
    """One value of a file, or the reason why it cannot be read.

    Attributes:
        line: from 1.
        column: from 1, in characters; None if the value is the whole line.
        problem: what is wrong here, as "is not JSON (Expecting value)"; empty if there
            is a value.
    """

    line: int
    column: int | None = None
    value: Any = None
    problem: str = ""

    @property
    def place(self) -> str:
        """The place as "17", or with its column as "17:3"."""
        return str(self.line) if self.column is None else f"{self.line}:{self.column}"


def open_records(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed if its name ends in .gz."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path)  # type: ignore[return-value] # it reads bytes
    return path.open("rb")


def without_gz(path: Path) -> Path:
    """Return a path without the .gz at its end, if there is one."""
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def is_array(start: bytes) -> bool:
    """Return whether a file that starts with `start` is an array of records."""
    return _ARRAY.match(start.removeprefix(_BOM)) is not None


def read_values(file: IO[bytes], *, skip: int = 0) -> Iterator[JsonValue]:
    """Yield the values of a file; blank lines are skipped.

    Only newlines end a line: strings may contain U+2028 and similar characters. A line
    that is not JSON yields a problem and reading continues; in an array a problem is
    the last value.

    Args:
        skip: number of values to skip; skipped lines are not parsed.
    """
    first, start = 1, file.readline(_CHUNK).removeprefix(_BOM)
    while start and not start.strip():
        first, start = first + start.endswith(b"\n"), file.readline(_CHUNK)
    if is_array(start):
        for index, value in enumerate(_ArrayReader(file, start, first).read()):
            if index >= skip or value.problem:
                yield value
        return
    if not start.endswith(b"\n"):
        start += file.readline()
    for number, line in enumerate(itertools.chain([start], file), first):
        if line.strip():
            if skip <= 0:
                yield _parse_line(number, line)
            skip -= 1


def _parse_line(number: int, line: bytes) -> JsonValue:
    try:
        return JsonValue(number, value=json.loads(line.decode().rstrip()))
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        problem = _describe_bad_byte(line[error.start])
        return JsonValue(number, column, problem=problem)
    except json.JSONDecodeError as error:
        return JsonValue(number, error.pos + 1, problem=f"is not JSON ({error.msg})")
    except (ValueError, RecursionError) as error:  # a huge number, deep nesting
        return JsonValue(number, problem=f"cannot be read as JSON ({error})")


class _ArrayReader:
    """Reads a JSON array value by value, with the line and column of its position."""

    def __init__(self, file: IO[bytes], start: bytes, line: int) -> None:
        """Start with bytes of line `line` that were already read from the file."""
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = self._decoder.decode(start)
        self._position, self._line, self._column = 0, line, 1
        self._failed = False

    def read(self) -> Iterator[JsonValue]:
        """Yield the values; the last one is a problem if the array is damaged."""
        self._move(self._text.index("[") + 1)
        more = self._find_next() != "]"
        while more:
            yield self._read_value()
            if self._failed:
                return
            more = self._find_next() == ","
            if more:
                self._move(self._position + 1)
        if self._find_next() != "]":
            yield self._describe("is not JSON (Expecting ',' delimiter)")
            return
        self._move(self._position + 1)
        if self._find_next():  # reads to the end, where gzip has its checksum
            yield self._describe("is after the end of the array")

    def _read_value(self) -> JsonValue:
        self._find_next()
        try:
            value, end = self._decode()
        except json.JSONDecodeError as error:
            self._failed = True
            bad = _find_bad_byte(self._text, self._position)
            position, problem = bad or (error.pos, f"is not JSON ({error.msg})")
            self._move(position)
            return self._describe(problem)
        except (ValueError, RecursionError) as error:
            self._failed = True
            return JsonValue(self._line, problem=f"cannot be read as JSON ({error})")
        bad = _find_bad_byte(self._text, self._position, end)
        if bad is None:
            result = JsonValue(self._line, self._column, value)
        else:
            self._move(bad[0])
            result = self._describe(bad[1])
        self._move(end)
        return result

    def _decode(self) -> tuple[Any, int]:
        """Return the value at the position and its end; reads chunks as needed.

        Raises:
            ValueError, RecursionError: see json.JSONDecoder.
        """
        while True:
            size = max(_CHUNK, len(self._text) - self._position)
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError:
                if not self._read_chunk(size):
                    raise
            else:  # a number cut after "1e+" parses as one that ends 2 characters early
                if end < len(self._text) - 2 or not self._read_chunk(size):
                    return value, end

    def _find_next(self) -> str:
        """Move to the next character other than white space; "" at the file's end."""
        while True:
            match = _NOT_BLANK.search(self._text, self._position)
            self._move(match.start() if match else len(self._text))
            if match or not self._read_chunk(_CHUNK):
                return match[0] if match else ""

    def _move(self, position: int) -> None:
        newlines = self._text.count("\n", self._position, position)
        if newlines:
            start = self._text.rfind("\n", self._position, position)
            self._line, self._column = self._line + newlines, position - start
        else:
            self._column += position - self._position
        self._position = position

    def _read_chunk(self, size: int) -> bool:
        """Drop the text before the position and append a chunk; False at the end."""
        text = ""
        while not text:
            data = self._file.read(size)
            text = self._decoder.decode(data, final=not data)
            if not data:
                break
        if text:
            self._text, self._position = self._text[self._position :] + text, 0
        return bool(text)

    def _describe(self, problem: str) -> JsonValue:
        return JsonValue(self._line, self._column, problem=problem)


def _find_bad_byte(
    text: str, start: int = 0, end: int | None = None
) -> tuple[int, str] | None:
    """Return the position of the first escaped byte, and a description."""
    part = text[start:end]
    if part.isascii():
        return None
    try:
        part.encode()
    except UnicodeEncodeError as error:
        byte = ord(part[error.start]) - 0xDC00  # undoes surrogateescape
        return start + error.start, _describe_bad_byte(byte)
    return None


def _describe_bad_byte(byte: int) -> str:
    return f"is not UTF-8 (the byte 0x{byte:02x}); save it as UTF-8"


def describe_type(value: Any) -> str:
    """Return the type of a JSON value in words, for error messages."""
    names = {str: "a string", bool: "true or false", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), "a number")
