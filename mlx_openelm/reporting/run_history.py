"""What the reports of fine-tuning and of pre-training share: rows of metrics, pacing.

A row is a line of metrics.jsonl: numbers by name, with their "step".
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mlx_openelm.message_parts import count_of
from mlx_openelm.reporting.charts import Point
from mlx_openelm.reporting.training_report import Sample, Table

MAX_ROWS = 200  # of the table of metrics

Row = Mapping[str, Any]
Column = tuple[str, str, Callable[[float], str]]  # key, title, format


def read_number(row: Row, key: str) -> float | None:
    """Return a finite number, or None if the value is missing, NaN or infinite."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None


def read_step(row: Row) -> float:
    """Return the step of a row; 0 if it has none."""
    return read_number(row, "step") or 0.0


def read_points(rows: Sequence[Row], key: str) -> list[Point]:
    """Return (step, value) of every row, by step."""
    return sorted(
        ((read_step(row), read_number(row, key)) for row in rows),
        key=lambda point: point[0],
    )


def tabulate(rows: Mapping[float, Row], columns: Sequence[Column]) -> Table:
    """Return the rows by step as a table, for screen readers and copying.

    Columns without a value are left out, and of many rows every n-th is shown.
    """
    steps = sorted(rows)
    every = math.ceil(len(steps) / MAX_ROWS)
    used = [c for c in columns if any(c[0] in row for row in rows.values())]
    shown = []
    for step in steps[::every]:
        values = [(read_number(rows[step], key), form) for key, _, form in used]
        cells = ["" if value is None else form(value) for value, form in values]
        shown.append([f"{step:,.0f}", *cells])
    thinned = f", every {_ordinal(every)} step of metrics.jsonl" if every > 1 else ""
    return Table(
        caption=f"The charts in numbers{thinned}",
        columns=["step", *(title for _, title, _ in used)],
        rows=shown,
    )


def _ordinal(number: int) -> str:
    special = {1: "st", 2: "nd", 3: "rd"} if number % 100 // 10 != 1 else {}
    return f"{number}{special.get(number % 10, 'th')}"


def group_samples(
    rows: Sequence[Row], best: float | None = None
) -> Iterable[list[Sample]]:
    """Yield the first sample of each prompt, and that of the best or last step."""
    prompts: dict[str, list[Row]] = {}
    for row in rows:
        prompts.setdefault(str(row.get("prompt", "")), []).append(row)
    for prompt, of_prompt in prompts.items():
        last = next((r for r in of_prompt[1:] if read_step(r) == best), of_prompt[-1])
        group = [of_prompt[0]] if last is of_prompt[0] else [of_prompt[0], last]
        yield [
            Sample(_caption(read_step(row), best), prompt, str(row.get("text", "")))
            for row in group
        ]


def _caption(step: float, best: float | None) -> str:
    if not step:
        return "Before training"
    best_one = ", the best" if step == best else ""
    return f"After {count_of(round(step), 'step')}{best_one}"


class Pace:
    """Limits the share of the time that repeated work takes; a block is that work."""

    def __init__(
        self,
        share: float,
        expected: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._share, self._clock = share, clock
        self._expected, self._spent = expected, 0.0
        self._created = self._entered = clock()

    def allows(self) -> bool:
        """Whether the work, if it takes as long as the last time, keeps the limit."""
        elapsed = self._clock() - self._created
        return self._spent + self._expected <= self._share * elapsed

    def __enter__(self) -> None:
        self._entered = self._clock()

    def __exit__(self, *exception: object) -> None:
        self._expected = self._clock() - self._entered
        self._spent += self._expected
