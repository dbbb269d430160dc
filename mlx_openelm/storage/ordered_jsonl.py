"""A file of answers in the order of their prompts; a stopped run goes on with it.

Every answer is a JSON object in a line of its own. Answers do not end in the order of
their prompts: those that are ahead of their turn wait in a hidden sibling,
`.NAME.ahead`. So at whatever moment the process dies, no answer is lost.
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
from mlx_openelm.storage.staging import held

JsonObject = dict[str, Any]
_BEGINNING = b'{"line": '  # of every answer's line


class Answers:
    """Takes answers in any order, and gives them on in the order of their places.

    Attributes:
        turn: the place of the answer that comes next.
        ahead: answers that wait for their turn, by place.
    """

    def __init__(self, give: Callable[[JsonObject], None]) -> None:
        self.turn = 0
        self.ahead: dict[int, JsonObject] = {}
        self._give = give

    def __contains__(self, place: int) -> bool:
        return place < self.turn or place in self.ahead

    def __len__(self) -> int:
        return self.turn + len(self.ahead)

    def add(self, place: int, answer: JsonObject) -> None:
        """Take an answer, unless there is one at its place."""
        if place not in self:
            self.ahead[place] = answer
            self._keep(place, answer)
            self.give_on()

    def give_on(self) -> None:
        """Give on the answers whose turn it is."""
        while self.turn in self.ahead:
            self._write(self.ahead[self.turn])
            self._give(self.ahead.pop(self.turn))
            self.turn += 1

    def _keep(self, place: int, answer: JsonObject) -> None:
        """Keep an answer, if it has to wait."""

    def _write(self, answer: JsonObject) -> None:
        """Write an answer whose turn it is."""


class AnswersFile(Answers):
    """Answers that are also written down, each at once."""

    def __init__(
        self,
        path: Path,
        find_place: Callable[[JsonObject], int | None],
        give: Callable[[JsonObject], None],
        *,
        force: bool = False,
    ) -> None:
        """Remember what to open.

        Args:
            find_place: tells the place of an answer that would be written now, too.
            give: given each answer that is written.
            force: replace answers that would not.
        """
        super().__init__(give)
        self._path = Path(os.path.realpath(path))  # the lock is for the file itself
        self._find_place, self._force = find_place, force
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Open the file, and find what is in it.

        What is whole and would be written now is kept; what a kill has left of a line,
        and "error" objects that would be others now, are not.

        Raises:
            OpenELMError: another process writes to it, it is something else, or it
                holds other answers and there is no force.
        """
        if self._path.exists() and not self._path.is_file():
            raise OpenELMError(f"{self._path} is no file; choose another place.")
        waiting = self._path.with_name(f".{self._path.name}.ahead")
        with contextlib.ExitStack() as opened:
            with explain_write_errors(self._path):
                opened.enter_context(held(self._path))
                self._file = opened.enter_context(closing(JsonLinesFile(self._path)))
                self._waiting = opened.enter_context(closing(JsonLinesFile(waiting)))
                opened.callback(_remove_empty, waiting)
                self._find_answers()
            self.give_on()  # what waited for its turn, and has it now
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

    def _find_answers(self) -> None:
        try:
            self._take_over()
        except _Stale as stale:
            if not self._force:
                raise OpenELMError(str(stale)) from stale
            self.turn, self.ahead = 0, {}
            self._waiting.cut(0)
            self._file.cut(0)

    def _take_over(self) -> None:
        size, behind = 0, {}
        for index, (end, answer) in enumerate(_read_answers(self._file)):
            place = self._find_place(answer)
            if place == index == self.turn:
                self.turn, size = self.turn + 1, end
            elif place == index:
                behind[place] = answer  # a gap before it is filled now
            elif "error" not in answer:
                raise _Stale(
                    f"{self._path} holds answers to other prompts or with other "
                    f"settings (line {index + 1}); choose another file, or say `force` "
                    "to replace them."
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
                    "prompts or with other settings; choose another file, or say "
                    "`force` to replace them."
                )
        self._waiting.cut(whole)
        for place, answer in behind.items():
            if place not in self.ahead:
                self.ahead[place] = answer
                self._waiting.append(answer)
        self._file.cut(size)

    def _keep(self, place: int, answer: JsonObject) -> None:
        if place > self.turn:
            self._waiting.append(answer)

    def _write(self, answer: JsonObject) -> None:
        self._file.append(answer)


def open_answers(
    output: Path | None,
    find_place: Callable[[JsonObject], int | None],
    give: Callable[[JsonObject], None] = lambda answer: None,
    *,
    force: bool = False,
) -> contextlib.AbstractContextManager[Answers]:
    """Return answers in a file, or in memory where there is no output."""
    if output is None:
        return contextlib.nullcontext(Answers(give))
    return AnswersFile(output, find_place, give, force=force)


def hash_key(*parts: object) -> str:
    """Return the key of an answer: a hash of all that decides it, as JSON."""
    data = json.dumps(parts).encode()
    return hashlib.blake2b(data, digest_size=12).hexdigest()


class _Stale(Exception):
    """The answers are others than would be written now."""


def _remove_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()


def _read_answers(file: JsonLinesFile) -> Iterator[tuple[int, JsonObject]]:
    """Yield each whole line's answer, and where the line ends.

    Raises:
        OpenELMError: a line is something else.
    """
    for number, (end, line) in enumerate(file.read_lines(), 1):
        torn = not line.endswith(b"\n")
        if torn and (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
            return
        answer = parse_line(line)
        if not _is_answer(answer):
            raise OpenELMError(
                f"{file.path}:{number} is no answer to a prompt, so it is left as it "
                "is; choose another file."
            )
        yield end, answer


def _is_answer(found: Any) -> bool:
    match found:
        case {"line": int(), "key": str()} | {"line": int(), "error": str()}:
            return True
    return False
