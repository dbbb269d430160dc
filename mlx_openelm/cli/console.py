"""Output on the terminal; no other module prints.

stdout gets the result; notes, progress, statistics and errors go to stderr. rich is
imported only when a bar or a table is drawn.
"""

import contextlib
import dataclasses
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_openelm.cli.flags import show_flags
from mlx_openelm.errors import shorten

if TYPE_CHECKING:
    from rich.console import RenderableType

LOG_SECONDS = 30.0  # between two lines of progress without a terminal


class Console:
    """Output of a command. With `quiet`, only the result and errors are written."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._noted: set[str] = set()  # by `note_once`

    def answer(self, text: str, *, end: str = "\n") -> None:
        """Write to stdout and flush."""
        sys.stdout.write(text + end)
        sys.stdout.flush()

    def answer_json(self, value: Mapping[str, Any]) -> None:
        self.answer(json.dumps(value, ensure_ascii=False, default=str))

    def answer_report(
        self, report: Any, show: Callable[["Console", Any], None], *, as_json: bool
    ) -> None:
        """Write a report (a dataclass) as JSON or with its view."""
        if as_json:
            self.answer_json(dataclasses.asdict(report))
        else:
            show(self, report)

    def answer_table(self, table: "RenderableType") -> None:
        """Draw a rich table on stdout; without a terminal, no cell is wrapped."""
        from rich.console import Console as RichConsole

        width = None if sys.stdout.isatty() else 1000
        drawn = RichConsole(
            file=sys.stdout, width=width, highlight=False, markup=False, emoji=False
        )
        drawn.print(table)

    def answer_facts(self, facts: Iterable[tuple[str, str]]) -> None:
        """Write names and values to stdout in two columns."""
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        for name, value in facts:
            grid.add_row(name, value)
        self.answer_table(grid)

    def note(self, text: str) -> None:
        """Write a line to stderr; parameters in backticks appear as flags."""
        if not self.quiet:
            sys.stderr.write(show_flags(text) + "\n")
            sys.stderr.flush()

    def confirm(self, question: str) -> bool:
        """Ask on the terminal; no is the default."""
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def note_once(self, text: str) -> None:
        """Write a line to stderr unless it was written before."""
        if text not in self._noted:
            self._noted.add(text)
            self.note(text)

    def note_next(self, *arguments: str | Path, program: str = "mlx-openelm") -> None:
        """Write the next useful command to stderr, ready to paste into a shell."""
        if not self.quiet:
            command = shlex.join((program, *map(str, arguments)))
            sys.stderr.write(f"Next:\n{escape_controls(command)}\n")
            sys.stderr.flush()

    def error(self, text: str) -> None:
        """Write one line, without the control characters of names in damaged files."""
        sys.stderr.write(f"error: {shorten(escape_controls(text))}\n")
        sys.stderr.flush()

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator["ProgressBar"]:
        """Show progress: a bar on a terminal, otherwise a line every 30 seconds."""
        shown = ProgressBar(what, self)
        try:
            yield shown
        finally:
            shown.close()


class ProgressBar:
    """A progress bar with the remaining time; it appears after one second."""

    def __init__(self, what: str, console: Console) -> None:
        self._what, self._console = what, console
        self._started = self._written = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def update(self, done: int, total: int, unit: str = "") -> None:
        now = time.monotonic()
        if self._console.quiet or now - self._started < 1.0:
            return
        if sys.stderr.isatty():
            self._draw(done, total, unit)
        elif now - self._written > LOG_SECONDS:
            self._written = now
            self._console.note(f"{self._what}: {done} of {total} {unit}".rstrip())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, done: int, total: int, unit: str) -> None:
        if self._bar is None:
            from rich.console import Console as RichConsole
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}", markup=False),
                TimeRemainingColumn(),
                console=RichConsole(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=total, unit=unit)
        self._bar.update(self._task, completed=done, total=total, unit=unit)


def escape_controls(text: str) -> str:
    """Return a text whose control characters are written as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def prepare_streams() -> None:
    """Replace closed standard streams, and make stdout accept any text."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Else the next file would get this descriptor, which MLX does not accept.
            opened = os.open(os.devnull, os.O_RDWR)
            if number:
                setattr(sys, name, open(opened, "w"))  # noqa: SIM115 - stays open
    if isinstance(sys.stdout, io.TextIOWrapper):  # bytes of paths stay unchanged
        utf8 = sys.stdout.encoding.lower() == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "replace")


def close_broken_pipe() -> None:
    """Redirect the interpreter's last flush of a closed stdout to the null device."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
