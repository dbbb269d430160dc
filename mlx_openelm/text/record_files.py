"""Files of JSON values: one per line, one array, or values with line breaks in them.

Reads fine-tuning data, tasks, prompts and pre-training corpora, plain or compressed
with gzip. A file is read in chunks and is never in memory as a whole; a value has at
most `MAX_RECORD_BYTES`. Values and problems have a line and column; the caller can stop
at the first problem or collect all of them.
"""

import codecs
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from mlx_openelm.input_files import (
    BOM,
    MAX_DEPTH,
    MAX_RECORD_BYTES,
    NOT_TEXT,
    TOO_DEEP,
    UTF16,
    check_depth,
    describe_start,
    parse_json,
)

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
RECORD_SUFFIXES = (*JSON_SUFFIXES, *(f"{suffix}.gz" for suffix in JSON_SUFFIXES))

# Raised if a file is missing, damaged or truncated, or its name contains a NUL
READ_ERRORS = (OSError, EOFError, zlib.error, ValueError)

_GZIP = b"\x1f\x8b\x08"  # with deflate, its only method
_CHUNK = 1 << 16  # bytes
_RECORDS = re.compile(rb'\s*\[\s*[{"\]]')  # an array of objects or strings
_OBJECTS = re.compile(rb"\s*\[\s*\{")
_OPEN_OBJECT = re.compile(rb"\s*\{(.*[{\[:,])?\s*\n")  # it continues on the next line
_NOT_BLANK = re.compile(r"[^ \t\r\n]")  # JSON's white space
_DECODER = json.JSONDecoder()
_TOO_LARGE = f"is larger than {MAX_RECORD_BYTES >> 20} MiB; split it"


@dataclass(frozen=True, slots=True)
class JsonValue:
    """One value of a file, or the reason why it cannot be read.

    Attributes:
        line: from 1.
        column: from 1, in characters; None if the value is the whole line.
        problem: what is wrong here, as "is not JSON (Expecting value)"; empty if there
            is a value.
        is_last: nothing after the problem can be read.
    """

    line: int
    column: int | None = None
    value: Any = None
    problem: str = ""
    is_last: bool = False

    @property
    def place(self) -> str:
        """The place as "17", or with its column as "17:3"."""
        return str(self.line) if self.column is None else f"{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Start:
    """The first line of a file that is not blank; of an array, up to a chunk of it.

    Attributes:
        line: its number, from 1.
        following: the next lines, up to one that is not blank; only read after "[" and
            after a whole array.
        is_array: the file is an array, also with elements that are not records.
        is_open_object: the line is the start of an object with line breaks in it.
    """

    line: int
    data: bytes
    following: bytes = b""
    is_array: bool = False
    is_open_object: bool = False

    @property
    def is_array_of_records(self) -> bool:
        """Whether the file is an array that starts with an object or a string."""
        start = self.data + self.following
        return self.is_array and _RECORDS.match(start) is not None

    @property
    def problem(self) -> str:
        """Why no line of the file can be read, or ""."""
        return describe_start(self.data, NOT_TEXT)


def open_records(path: Path) -> IO[bytes]:
    """Open a file for reading; see `decompress`."""
    return decompress(path.open("rb"))


def decompress(file: io.BufferedReader) -> IO[bytes]:
    """Return a reader of the decompressed bytes of a file, if they are gzip's.

    The name does not count: downloads are often unpacked without being renamed.
    """
    if not file.peek(3).startswith(_GZIP):
        return file
    return io.BufferedReader(_Unpacked(file), _CHUNK)


class _Unpacked(io.RawIOBase):
    """The decompressed bytes of a gzip file, up to a damaged place if it has one.

    `gzip.GzipFile` itself reads ahead, and fails before all whole lines are returned.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file, self._unpacked = file, gzip.GzipFile(fileobj=file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._unpacked.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def without_gz(path: Path) -> Path:
    """Return a path without the .gz at its end, if there is one."""
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def is_record_file(name: str) -> bool:
    """Return whether a file name has a suffix of files of JSON values."""
    return name.lower().endswith(RECORD_SUFFIXES)


def read_start(file: IO[bytes]) -> Start:
    """Read the start of a file; its data are empty if there is none."""
    line, data = 1, file.readline(_CHUNK).removeprefix(BOM)
    while data and not data.strip():
        line, data = line + data.endswith(b"\n"), file.readline(_CHUNK)
    begins_array = data.lstrip().startswith(b"[")
    if not data.endswith(b"\n") and len(data) >= _CHUNK - len(BOM):
        if begins_array:
            return Start(line, data, is_array=True)
        data += file.readline(MAX_RECORD_BYTES + 1 - len(data))
    if not begins_array:
        is_object = _OPEN_OBJECT.fullmatch(data) is not None and _parse(data) == "open"
        return Start(line, data, is_open_object=is_object)
    kind, following = _parse(data), b""
    if kind == "whole" or data.strip() == b"[":
        following = _read_following(file)
    next_character = following.lstrip()[:1]
    match kind:
        case "whole":  # lines that each hold a list are values
            after_records = next_character != b"[" and _RECORDS.match(data) is not None
            is_array = not next_character or after_records
        case "broken":
            is_array = _OBJECTS.match(data) is not None
        case _:
            is_array = True
    return Start(line, data, following, is_array)


def _read_following(file: IO[bytes]) -> bytes:
    """Return lines up to one that is not blank."""
    lines = b""
    while not lines.strip() and len(lines) < _CHUNK:
        line = file.readline(MAX_RECORD_BYTES + 1)
        if not line:
            break
        lines += line
    return lines


def _parse(line: bytes) -> Literal["whole", "open", "broken"]:
    """Return whether a line is a whole JSON value, the start of one, or neither."""
    text = line.decode(errors="replace").rstrip()
    try:
        parse_json(text)
    except json.JSONDecodeError as error:
        return "open" if error.pos == len(text) else "broken"
    except ValueError:  # a huge number, deep nesting
        return "broken"
    return "whole"


def read_values(
    file: IO[bytes],
    *,
    skip: int = 0,
    every: int = 1,
    start: Start | None = None,
    skip_large: bool = False,
) -> Iterator[JsonValue]:
    """Yield the values of a file; blank lines are skipped.

    Only newlines end a line: strings may contain U+2028 and similar characters. A line
    that is not JSON yields a problem and reading continues. A problem is the last value
    in an array, between values with line breaks, of a value that is too large, and of
    a file that is not UTF-8 text at all.

    Args:
        skip: number of values to skip; skipped lines are not parsed.
        every: in lines, yield only each so many-th value after that.
        start: what `read_start` has read of the file.
        skip_large: continue after a line that is too large.
    """
    start = start or read_start(file)
    problem = start.problem or (UTF16 if b"\0" in start.data[:4] else "")
    if problem:
        yield JsonValue(start.line, 1, problem=problem, is_last=True)
    elif start.is_array or start.is_open_object:
        values = _StreamReader(file, start).read()
        for index, value in enumerate(values):
            if index >= skip or value.problem:
                yield value
    else:
        lines = read_lines(file, start, skip_large=skip_large)
        for number, line in itertools.islice(lines, skip, None, every):
            yield parse_line(number, line)


def read_lines(
    file: IO[bytes], start: Start, *, skip_large: bool = False
) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each line that is not blank.

    Of a line that is too large, the first `MAX_RECORD_BYTES` + 1 bytes; it is the last
    one unless `skip_large`.
    """
    number, line, following = start.line, start.data, io.BytesIO(start.following)
    while line:
        if not line.isspace():
            yield number, line
        if len(line) > MAX_RECORD_BYTES:
            if not skip_large:
                return
            if not line.endswith(b"\n"):
                skip_line(file)
        line = following.readline() or file.readline(MAX_RECORD_BYTES + 1)
        number += 1


def skip_line(file: IO[bytes]) -> int:
    """Read up to a newline or the file's end; return the number of bytes."""
    count = 0
    while part := file.readline(_CHUNK):
        count += len(part)
        if part.endswith(b"\n"):
            break
    return count


def describe_line_problem(line: bytes) -> tuple[int | None, str]:
    """Return the column and the reason why a line is not text; "" if it is."""
    if len(line) > MAX_RECORD_BYTES:
        return None, _TOO_LARGE
    try:
        line.decode()
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        return column, _describe_bad_byte(line[error.start])
    return None, ""


def parse_line(number: int, line: bytes) -> JsonValue:
    """Return the value of a line, or why it has none."""
    if len(line) <= MAX_RECORD_BYTES:
        try:
            text = line.removeprefix(BOM).decode().rstrip()
            return JsonValue(number, value=parse_json(text))
        except UnicodeDecodeError:
            pass
        except json.JSONDecodeError as error:
            column, problem = error.pos + 1, f"is not JSON ({error.msg})"
            return JsonValue(number, column, problem=problem)
        except ValueError as error:  # a huge number, deep nesting
            return JsonValue(number, problem=f"cannot be read as JSON ({error})")
    at, problem = describe_line_problem(line)
    return JsonValue(number, at, problem=problem)


class _StreamReader:
    """Reads an array, or values one after the other, with line and column of each."""

    def __init__(self, file: IO[bytes], start: Start) -> None:
        self._file, self._is_array = file, start.is_array
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = self._decoder.decode(start.data + start.following)
        self._position, self._line, self._column = 0, start.line, 1
        self._failed = False

    def read(self) -> Iterator[JsonValue]:
        """Yield the values; the last one is a problem if the file is damaged."""
        if self._is_array:
            yield from self._read_array()
            return
        while not self._failed and self._find_next():
            yield self._read_value()

    def _read_array(self) -> Iterator[JsonValue]:
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
            yield self._describe("is not JSON (Expecting ',' delimiter)", is_last=True)
            return
        self._move(self._position + 1)
        if self._find_next():  # reads to the end, where gzip has its checksum
            yield self._describe("is after the end of the array", is_last=True)

    def _read_value(self) -> JsonValue:
        self._find_next()
        try:
            value, end = self._decode()
        except json.JSONDecodeError as error:
            self._failed = True
            bad = _find_bad_byte(self._text, self._position)
            position, problem = bad or (error.pos, f"is not JSON ({error.msg})")
            self._move(position)
            return self._describe(problem, is_last=True)
        except ValueError as error:
            self._failed = True
            problem = f"cannot be read as JSON ({error})"
            return JsonValue(self._line, problem=problem, is_last=True)
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
            ValueError: it is not JSON, too large, or nested too deeply.
        """
        while True:
            size = max(_CHUNK, len(self._text) - self._position)
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError:
                if size > MAX_RECORD_BYTES:
                    raise ValueError(f"it {_TOO_LARGE}") from None
                if not self._read_chunk(size):
                    raise
            except RecursionError:
                raise ValueError(TOO_DEEP) from None
            else:  # a number cut after "1e+" parses as one that ends 2 characters early
                if end < len(self._text) - 2 or not self._read_chunk(size):
                    parts = self._text[self._position : end]
                    if parts.count("[") + parts.count("{") > MAX_DEPTH:
                        check_depth(value)
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

    def _describe(self, problem: str, *, is_last: bool = False) -> JsonValue:
        return JsonValue(self._line, self._column, problem=problem, is_last=is_last)


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
    """Return the type of a value of JSON or Parquet in words, for error messages."""
    names = {
        str: "a string",
        bool: "true or false",
        list: "a list",
        dict: "an object",
        int: "a number",
        float: "a number",
    }
    name = type(value).__name__
    return "null" if value is None else names.get(type(value), f"of type {name}")
