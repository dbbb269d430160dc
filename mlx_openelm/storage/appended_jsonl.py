"""A JSON-lines file that is appended to and can be resumed after a kill.

Every line is written unbuffered. A kill can truncate only the last line, which then has
no newline.
"""

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import parse_json
from mlx_openelm.message_parts import count_of


class JsonLinesFile:
    """A file that is open for reading and for appending lines."""

    def __init__(self, path: Path) -> None:
        """Open the file, creating it if necessary.

        Raises:
            OpenELMError: the file cannot be written, as in `truncate` and `append`.
        """
        self.path = path
        with explain_write_errors(self.path):
            self._file = path.open("a+b", buffering=0)

    def close(self) -> None:
        self._file.close()

    def read_lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield the offset of the end of each line, and the line."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            end += len(line)
            yield end, line

    def truncate(self, size: int) -> None:
        """Truncate the file to its first `size` bytes."""
        with explain_write_errors(self.path):
            self._file.truncate(size)

    def append(self, value: Any) -> None:
        rest = to_line(value).encode() + b"\n"
        with explain_write_errors(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into an OpenELMError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"The disk of {path} is full; free disk space and repeat"
        else:
            problem = f"Cannot write {path}: {error.strerror or error}"
        raise OpenELMError(f"{problem}. The answers in it are kept.") from error


def to_line(value: Any) -> str:
    """Return the line of a value, without the newline."""
    return json.dumps(value, ensure_ascii=False)


def parse_line(line: bytes) -> Any:
    """Return the value of a line; None if it is truncated or not JSON."""
    if not line.endswith(b"\n"):
        return None
    try:
        return parse_json(line)
    except ValueError:
        return None


def note_kept_answers(error: BaseException | None, count: int) -> None:
    """Add a note to an interruption: the answers so far are kept."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        error.add_note(f"The same command resumes from {count_of(count, 'answer')}.")
