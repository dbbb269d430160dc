"""Files of JSON values: one a line or one array, plain or compressed with gzip.

The one reader of fine-tuning data, tasks, prompts and pre-training corpora. A file is
read in chunks and never held as a whole. Every value comes with its place, and so does
every problem, so that a caller can stop at the first one or collect all of them.
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

# Raised where a file is missing, damaged or cut off, or its name holds a NUL
READ_ERRORS = (OSError, EOFError, zlib.error, ValueError)

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 16  # bytes
# An array of objects or texts; a line that begins with another array is one value.
_ARRAY = re.compile(rb'\s*\[(\s*[{"\]]|[ \t\r]*\n|\s*$)')
_FILLED = re.compile(r"[^ \t\r\n]")  # no white space of JSON
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class JsonValue:
    """One value of a file, or the reason why it cannot be read.

    Attributes:
        line: from 1.
        column: from 1, in characters; None where the value is the whole line.
        problem: what is wrong at this place, as "is no JSON (Expecting value)"; empty
            where there is a value.
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
    """Whether a file that starts like this is an array of records."""
    return _ARRAY.match(start.removeprefix(_BOM)) is not None


def read_values(file: IO[bytes], *, skip: int = 0) -> Iterator[JsonValue]:
    """Yield the values of a file; blank lines are passed over.

    Lines end at a newline alone: a text may contain U+2028 and similar characters. A
    line that is no JSON is one problem among the other values; an array ends with it.

    Args:
        skip: number of values to leave out; lines among them are not even parsed.
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
        return JsonValue(number, error.pos + 1, problem=f"is no JSON ({error.msg})")
    except (ValueError, RecursionError) as error:  # a huge number, deep nesting
        return JsonValue(number, problem=f"cannot be read as JSON ({error})")


class _ArrayReader:
    """Reads a JSON array value by value, with the line and column of its position."""

    def __init__(self, file: IO[bytes], start: bytes, line: int) -> None:
        """Start at bytes of this line that are already read from the file."""
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
            yield self._describe("is no JSON (Expecting ',' delimiter)")
            return
        self._move(self._position + 1)
        if self._find_next():  # reads to the end, where gzip has its checksum
            yield self._describe("is behind the end of the array")

    def _read_value(self) -> JsonValue:
        self._find_next()
        try:
            value, end = self._decode()
        except json.JSONDecodeError as error:
            self._failed = True
            bad = _find_bad_byte(self._text, self._position)
            position, problem = bad or (error.pos, f"is no JSON ({error.msg})")
            self._move(position)
            return self._describe(problem)
        except (ValueError, RecursionError) as error:
            self._failed = True
            return JsonValue(self._line, problem=f"cannot be read as JSON ({error})")
        bad = _find_bad_byte(self._text, self._position, end)
        if bad is None:
            found = JsonValue(self._line, self._column, value)
        else:
            self._move(bad[0])
            found = self._describe(bad[1])
        self._move(end)
        return found

    def _decode(self) -> tuple[Any, int]:
        """Return the value at the position and its end, with as many chunks as needed.

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
            else:  # a number that a chunk cuts in "1e+" ends 2 characters before it
                if end < len(self._text) - 2 or not self._read_chunk(size):
                    return value, end

    def _find_next(self) -> str:
        """Move to the next character that is no white space; "" at the file's end."""
        while True:
            found = _FILLED.search(self._text, self._position)
            self._move(found.start() if found else len(self._text))
            if found or not self._read_chunk(_CHUNK):
                return found[0] if found else ""

    def _move(self, position: int) -> None:
        newlines = self._text.count("\n", self._position, position)
        if newlines:
            start = self._text.rfind("\n", self._position, position)
            self._line, self._column = self._line + newlines, position - start
        else:
            self._column += position - self._position
        self._position = position

    def _read_chunk(self, size: int) -> bool:
        """Replace what is before the position by more text, if there is any."""
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
    """Return where the first escaped byte is, and the problem in words."""
    part = text[start:end]
    if part.isascii():
        return None
    try:
        part.encode()
    except UnicodeEncodeError as error:
        byte = ord(part[error.start]) - 0xDC00  # as surrogateescape has it
        return start + error.start, _describe_bad_byte(byte)
    return None


def _describe_bad_byte(byte: int) -> str:
    return f"is no UTF-8 (the byte 0x{byte:02x}); save it as UTF-8"


def describe_type(value: Any) -> str:
    """Return the type of a JSON value in words, for error messages."""
    names = {str: "a text", bool: "true or false", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), "a number")
