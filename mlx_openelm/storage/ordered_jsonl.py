"""A file of answers in the order of their prompts; a stopped run goes on with it.

Every answer is a JSON object in a line of its own. Answers do not end in the order of
their prompts: those that are ahead of their turn wait in a hidden sibling,
`.NAME.ahead`. So at whatever moment the process dies, no answer is lost.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from mlx_openelm.errors import OpenELMError
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
            with self._in_one_sentence():
                opened.enter_context(held(self._path))
                self._file = opened.enter_context(self._path.open("a+b", buffering=0))
                self._waiting = opened.enter_context(waiting.open("a+b", buffering=0))
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
                os.unlink(self._waiting.name)
        self._opened.close()
        if isinstance(error, KeyboardInterrupt | SystemExit):
            error.add_note(f"The same command goes on from {len(self)} answers.")

    def _find_answers(self) -> None:
        try:
            self._take_over()
        except _Stale as stale:
            if not self._force:
                raise OpenELMError(str(stale)) from stale
            self.turn, self.ahead = 0, {}
            _cut(self._waiting, 0)
            _cut(self._file, 0)

    def _take_over(self) -> None:
        size, behind = 0, {}
        for index, (end, answer) in enumerate(_read_answers(self._file, self._path)):
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
        for end, answer in _read_answers(self._waiting, Path(self._waiting.name)):
            whole = end
            place = self._find_place(answer)
            if place is not None and place not in self:
                self.ahead[place] = answer
            elif place is None and "error" not in answer:
                raise _Stale(
                    f"{self._waiting.name} holds answers of a stopped run to other "
                    "prompts or with other settings; choose another file, or say "
                    "`force` to replace them."
                )
        _cut(self._waiting, whole)
        for place, answer in behind.items():
            if place not in self.ahead:
                self.ahead[place] = answer
                _append(self._waiting, answer)
        _cut(self._file, size)

    def _keep(self, place: int, answer: JsonObject) -> None:
        if place > self.turn:
            with self._in_one_sentence():
                _append(self._waiting, answer)

    def _write(self, answer: JsonObject) -> None:
        with self._in_one_sentence():
            _append(self._file, answer)

    @contextlib.contextmanager
    def _in_one_sentence(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                what = f"The disk of {self._path} is full; make room and repeat"
            else:
                what = f"Cannot write {self._path}: {error}"
            raise OpenELMError(f"{what}. The answers in it stay.") from error


class _Stale(Exception):
    """The answers are others than would be written now."""


def _remove_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()


def _append(file: IO[bytes], answer: JsonObject) -> None:
    rest = to_line(answer).encode() + b"\n"
    while rest:
        rest = rest[file.write(rest) :]


def _cut(file: IO[bytes], size: int) -> None:
    file.truncate(size)


def to_line(answer: JsonObject) -> str:
    """Return an answer as its line has it."""
    return json.dumps(answer, ensure_ascii=False)


def _read_answers(file: IO[bytes], path: Path) -> Iterator[tuple[int, JsonObject]]:
    """Yield each whole line's answer, and where the line ends.

    Raises:
        OpenELMError: a line is something else.
    """
    file.seek(0)
    end = 0
    for number, line in enumerate(file, 1):
        torn = not line.endswith(b"\n")
        if torn and (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
            return
        try:
            found = json.loads(line.decode())
        except (ValueError, RecursionError):
            found = None
        if torn or not _is_answer(found):
            raise OpenELMError(
                f"{path}:{number} is no answer to a prompt, so it is left as it is; "
                "choose another file."
            )
        end += len(line)
        yield end, found


def _is_answer(found: Any) -> bool:
    match found:
        case {"line": int(), "key": str()} | {"line": int(), "error": str()}:
            return True
    return False
