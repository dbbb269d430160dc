"""Output on the terminal; no other module prints.

stdout carries the answer; notes, progress, statistics and errors go to stderr. rich is
imported when a bar or a table is drawn, and not before.
"""

import contextlib
import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mlx_openelm.cli.flags import show_flags

if TYPE_CHECKING:
    from rich.console import RenderableType

LOG_SECONDS = 30.0  # between two lines of progress where there is no terminal


class Console:
    """Output of a command. With `quiet`, only the answer and errors are written."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    def answer(self, text: str, *, end: str = "\n") -> None:
        """Write to stdout, at once."""
        sys.stdout.write(text + end)
        sys.stdout.flush()

    def answer_json(self, value: Mapping[str, Any]) -> None:
        self.answer(json.dumps(value, ensure_ascii=False, default=str))

    def answer_report(
        self, report: Any, show: Callable[["Console", Any], None], *, as_json: bool
    ) -> None:
        """Write a dataclass as JSON, or let a view show it."""
        if as_json:
            self.answer_json(dataclasses.asdict(report))
        else:
            show(self, report)

    def answer_table(self, table: "RenderableType") -> None:
        """Draw a rich table on stdout, wide enough for its cells in a pipe."""
        from rich.console import Console as RichConsole

        width = None if sys.stdout.isatty() else 1000  # no cell is folded there
        drawn = RichConsole(
            file=sys.stdout, width=width, highlight=False, markup=False, emoji=False
        )
        drawn.print(table)

    def answer_facts(self, facts: Iterable[tuple[str, str]]) -> None:
        """Draw names and values in two columns on stdout."""
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

    def error(self, text: str) -> None:
        """Write one line; a damaged file's names may hold what would break it."""
        sys.stderr.write(f"error: {escape_controls(text)}\n")
        sys.stderr.flush()

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator["ProgressBar"]:
        """Show progress: a bar on a terminal, else a line from time to time."""
        shown = ProgressBar(what, self)
        try:
            yield shown
        finally:
            shown.close()


class ProgressBar:
    """A progress bar with the time left; it appears after one second."""

    def __init__(self, what: str, console: Console) -> None:
        self._what, self._console = what, console
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def update(self, done: int, total: int, unit: str = "") -> None:
        now = time.monotonic()
        if self._console.quiet or now - self._started < 1.0:
            return
        if sys.stderr.isatty():
            self._draw(done, total, unit)
        elif now - self._said > LOG_SECONDS:
            self._said = now
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
    """Return a text whose control characters are spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def prepare_streams() -> None:
    """Let any text be printed, and nothing fail where a stream is closed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Left open, its number would be given to the next file, and MLX balks.
            opened = os.open(os.devnull, os.O_RDWR)
            if number:
                setattr(sys, name, open(opened, "w"))  # noqa: SIM115 - for good
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path's bytes come out as they were
        utf8 = sys.stdout.encoding.lower() == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "replace")


def close_broken_pipe() -> None:
    """Let the interpreter's last flush of a closed stdout go nowhere."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
