"""Files of records: JSON lines or one JSON array, plain or compressed with gzip.

Every object comes with its place in the file; errors are collected, with file, line and
column, so that a caller can report all of them at once.
"""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")

# An array of records; a line that begins with another array holds no record.
_ARRAY = re.compile(rb"\s*\[\s*([{\]]|$)")
_NOTHING = object()  # the value of what is no JSON


def open_records(path: Path) -> IO[bytes]:
    """Open a file for `read_objects`, decompressed if its name ends in .gz."""
    if path.suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value] # it reads bytes
    return path.open("rb")


def read_objects(
    path: Path, lines: IO[bytes], problems: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place ("17", in an array "17:3") and the object of every record.

    Lines end at a newline alone: a text may contain U+2028 and similar characters.

    Args:
        path: named in the problems.
        problems: receives a message for everything that is no object.
    """
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        if _ARRAY.match(line):
            yield from _read_array(path, number, line + lines.read(), problems)
            return
        text = _decode(path, number, line, problems)
        if text is None:
            continue
        value = _parse(path, number, text.rstrip(), problems)
        if isinstance(value, dict):
            yield str(number), value
        elif value is not _NOTHING:
            problems.append(f"{path}:{number} is {describe_type(value)}, not an object")


def _decode(path: Path, line: int, data: bytes, problems: list[str]) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line += before.count(b"\n")
        column = len(before) - before.rfind(b"\n")
        problems.append(
            f"{path}:{line}:{column} is no UTF-8 (the byte 0x{data[error.start]:02x}); "
            "save it as UTF-8"
        )
        return None


def _parse(path: Path, line: int, text: str, problems: list[str]) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{line + error.lineno - 1}:{error.colno}"
        problems.append(f"{path}:{place} is no JSON ({error.msg})")
    except (ValueError, RecursionError) as error:  # a huge number, deep nesting
        problems.append(f"{path}:{line} cannot be read as JSON ({error})")
    return _NOTHING


def _read_array(
    path: Path, line: int, data: bytes, problems: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of a JSON array, each with its line and column."""
    text = _decode(path, line, data, problems)
    if text is None:
        return
    values = _parse(path, line, text, problems)
    if values is _NOTHING:
        return
    # The array is valid: decode it again to find the position of each record.
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    position = text.index("[") + 1
    line, counted = line + text.count("\n", 0, position), position
    for value in values:
        space = gap.match(text, position)
        assert space is not None  # the pattern matches the empty string
        start = space.end()
        line, counted = line + text.count("\n", counted, start), start
        place = f"{line}:{start - text.rfind(chr(10), 0, start)}"
        _, position = decoder.raw_decode(text, start)
        if isinstance(value, dict):
            yield place, value
        else:
            problems.append(f"{path}:{place} is {describe_type(value)}, not an object")


def describe_type(value: Any) -> str:
    """Return the type of a JSON value in words, for error messages."""
    if value is None:
        return "missing or null"
    names = {str: "a text", bool: "true or false", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
