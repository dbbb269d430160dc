"""A JSON-lines file of answers in the order of their prompts, from which a run resumes.

Answers arrive in any order. Those that arrive before their turn are stored in a hidden
sibling, `.NAME.ahead`, so that no answer is lost when the process dies.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.appended_jsonl import (
    JsonLinesFile,
    explain_write_errors,
    note_kept_answers,
    parse_line,
)
from mlx_openelm.storage.staging import lock_target

JsonObject = dict[str, Any]
_LINE_START = b'{"line": '  # of every answer


class Answers:
    """Receives answers in any order and passes them on in the order of their places.

    Attributes:
        turn: the place of the next answer to pass on.
        ahead: answers that wait for their turn, by place.
    """

    def __init__(self, on_answer: Callable[[JsonObject], None]) -> None:
        self.turn = 0
        self.ahead: dict[int, JsonObject] = {}
        self._on_answer = on_answer

    def __contains__(self, place: int) -> bool:
        return place < self.turn or place in self.ahead

    def __len__(self) -> int:
        return self.turn + len(self.ahead)

    def add(self, place: int, answer: JsonObject) -> None:
        """Add an answer, unless there is one at its place."""
        if place not in self:
            self.ahead[place] = answer
            self._store_ahead(place, answer)
            self.flush()

    def flush(self) -> None:
        """Pass on the answers whose turn it is."""
        while self.turn in self.ahead:
            self._write(self.ahead[self.turn])
            self._on_answer(self.ahead.pop(self.turn))
            self.turn += 1

    def _store_ahead(self, place: int, answer: JsonObject) -> None:
        """Store an answer that arrives before its turn."""

    def _write(self, answer: JsonObject) -> None:
        """Write an answer whose turn it is."""


class AnswersFile(Answers):
    """Answers that are written to a file, unbuffered."""

    def __init__(
        self,
        path: Path,
        find_place: Callable[[JsonObject], int | None],
        on_answer: Callable[[JsonObject], None],
        *,
        force: bool = False,
    ) -> None:
        """Store the arguments; `with` opens the file.

        Args:
            find_place: returns the place of a stored answer in this run, or None if
                this run would not write it.
            on_answer: called with each answer that is written.
            force: replace a file with answers that this run would not write.
        """
        super().__init__(on_answer)
        self._path = Path(os.path.realpath(path))  # the lock is for the file itself
        self._find_place, self._force = find_place, force
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Open the file and read the answers in it.

        Answers of this run are kept. Truncated lines, and "error" objects that this run
        would not write, are dropped.

        Raises:
            OpenELMError: another process writes to the file, it is not a file of
                answers, or has those of another run and `force` is off.
        """
        if self._path.exists() and not self._path.is_file():
            raise OpenELMError(f"{self._path} is not a file; choose another path.")
        waiting = self._path.with_name(f".{self._path.name}.ahead")
        with contextlib.ExitStack() as opened:
            with explain_write_errors(self._path):
                opened.enter_context(lock_target(self._path))
                self._file = opened.enter_context(closing(JsonLinesFile(self._path)))
                self._waiting = opened.enter_context(closing(JsonLinesFile(waiting)))
                opened.callback(_remove_empty, waiting)
                self._load()
            self.flush()
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.ahead:
            with contextlib.suppress(OSError):
                self._waiting.path.unlink()
        self._opened.close()
        note_kept_answers(error, len(self))

    def _load(self) -> None:
        try:
            self._resume()
        except _Stale as stale:
            if not self._force:
                raise OpenELMError(str(stale)) from stale
            self.turn, self.ahead = 0, {}
            self._waiting.truncate(0)
            self._file.truncate(0)

    def _resume(self) -> None:
        """Keep the answers up to the first gap; move later ones to the sibling."""
        size, after_gap = 0, {}
        for index, (end, answer) in enumerate(_read_answers(self._file)):
            place = self._find_place(answer)
            if place == index == self.turn:
                self.turn, size = self.turn + 1, end
            elif place == index:
                after_gap[place] = answer
            elif "error" not in answer:
                raise _Stale(
                    f"{self._path} holds answers to other prompts or with other "
                    f"settings (line {index + 1}); choose another file, or pass "
                    "`force` to replace them."
                )
        whole = 0
        for end, answer in _read_answers(self._waiting):
            whole = end
            place = self._find_place(answer)
            if place is not None and place not in self:
                self.ahead[place] = answer
            elif place is None and "error" not in answer:
                raise _Stale(
                    f"{self._waiting.path} holds answers of a stopped run to other "
                    "prompts or with other settings; choose another file, or pass "
                    "`force` to replace them."
                )
        self._waiting.truncate(whole)
        for place, answer in after_gap.items():
            if place not in self.ahead:
                self.ahead[place] = answer
                self._waiting.append(answer)
        self._file.truncate(size)

    def _store_ahead(self, place: int, answer: JsonObject) -> None:
        if place > self.turn:
            self._waiting.append(answer)

    def _write(self, answer: JsonObject) -> None:
        self._file.append(answer)


def open_answers(
    output: Path | None,
    find_place: Callable[[JsonObject], int | None],
    on_answer: Callable[[JsonObject], None] = lambda answer: None,
    *,
    force: bool = False,
) -> contextlib.AbstractContextManager[Answers]:
    """Return answers in a file, or in memory if there is no output."""
    if output is None:
        return contextlib.nullcontext(Answers(on_answer))
    return AnswersFile(output, find_place, on_answer, force=force)


def hash_key(*parts: object) -> str:
    """Return the key of an answer: a hash of everything that it depends on, as JSON."""
    data = json.dumps(parts).encode()
    return hashlib.blake2b(data, digest_size=12).hexdigest()


class _Stale(Exception):
    """The stored answers belong to another run."""


def _remove_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()


def _read_answers(file: JsonLinesFile) -> Iterator[tuple[int, JsonObject]]:
    """Yield the offset of the end of each complete line, and its answer.

    Raises:
        OpenELMError: a line is not an answer.
    """
    for number, (end, line) in enumerate(file.read_lines(), 1):
        truncated = not line.endswith(b"\n")
        if truncated and (line.startswith(_LINE_START) or _LINE_START.startswith(line)):
            return
        answer = parse_line(line)
        if not _is_answer(answer):
            raise OpenELMError(
                f"{file.path}:{number} is not an answer to a prompt, so the file is "
                "left unchanged; choose another file."
            )
        yield end, answer


def _is_answer(value: Any) -> bool:
    match value:
        case {"line": int(), "key": str()} | {"line": int(), "error": str()}:
            return True
    return False
