"""A file of JSON lines that is written line by line, and continued after a kill.

Every line goes to the file at once and as a whole. A kill can tear the last line alone,
which then has no newline.
"""

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError


class JsonLinesFile:
    """A file that is opened for reading and for appending lines."""

    def __init__(self, path: Path) -> None:
        """Open the file; it is made where it is not there.

        Raises:
            OpenELMError: the disk refuses, as in `cut` and `append`.
        """
        self.path = path
        with explain_write_errors(self.path):
            self._file = path.open("a+b", buffering=0)

    def close(self) -> None:
        self._file.close()

    def read_lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield every line, and the size of the file up to its end."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            end += len(line)
            yield end, line

    def cut(self, size: int) -> None:
        """Remove what is behind the first `size` bytes."""
        with explain_write_errors(self.path):
            self._file.truncate(size)

    def append(self, value: Any) -> None:
        rest = to_line(value).encode() + b"\n"
        with explain_write_errors(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Raise OpenELMError, which names the file, where the disk refuses."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"The disk of {path} is full; make room and repeat"
        else:
            what = f"Cannot write {path}: {error.strerror or error}"
        raise OpenELMError(f"{what}. The answers in it stay.") from error


def to_line(value: Any) -> str:
    """Return a value as its line has it, without the newline."""
    return json.dumps(value, ensure_ascii=False)


def parse_line(line: bytes) -> Any:
    """Return the value of a line; None for what is torn or no JSON."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


def note_kept_answers(error: BaseException | None, count: int) -> None:
    """Add to an interruption that the answers so far are kept."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        error.add_note(f"The same command goes on from {count} answers.")
