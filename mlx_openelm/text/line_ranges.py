"""Ranges of bytes of a file with one JSON value per line."""

import itertools
from collections.abc import Iterator
from typing import IO

from mlx_openelm.input_files import MAX_RECORD_BYTES
from mlx_openelm.text.record_files import JsonValue, parse_line, skip_line


def read_line_range(
    file: IO[bytes], begin: int, end: int, *, skip: int = 0
) -> Iterator[JsonValue]:
    """Yield the values of the lines whose first byte is in a range of bytes.

    The lines of consecutive ranges are all lines of the file, each once. `JsonValue`
    counts lines from the first one of the range.

    Args:
        skip: number of values to skip; their lines are not parsed.
    """
    lines = _read_lines(file, begin, end)
    for number, line in itertools.islice(lines, skip, None):
        yield parse_line(number, line)


def find_first_line(file: IO[bytes], begin: int) -> int:
    """Move to the first line that begins at a byte or after it; return its position."""
    if begin == 0:
        return file.seek(0)
    return file.seek(begin - 1) + skip_line(file)


def _read_lines(file: IO[bytes], begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    at, number = find_first_line(file, begin), 0
    while at < end and (line := file.readline(MAX_RECORD_BYTES + 1)):
        number, at = number + 1, at + len(line)
        if not line.isspace():
            yield number, line
        if not line.endswith(b"\n"):
            at += skip_line(file)


def count_lines_before(file: IO[bytes], begin: int) -> tuple[int, int]:
    """Return the numbers of lines, and of those not blank, before `begin`'s range."""
    end, at, lines, values = find_first_line(file, begin), file.seek(0), 0, 0
    while at < end:
        line = file.readline(MAX_RECORD_BYTES + 1)
        lines, values, at = lines + 1, values + (not line.isspace()), at + len(line)
        if not line.endswith(b"\n"):
            at += skip_line(file)
    return lines, values
