"""Losses of another run, to be drawn beside ours: CoreNet's log or a metrics.jsonl.

A line of CoreNet's training_logs.txt has the iteration as `[ 500/350000]` and the
losses by name. Other lines, and those of validation, are ignored. A run that was
restarted repeats iterations; the last value counts.
"""

import re
from pathlib import Path

from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import parse_json, read_text
from mlx_openelm.message_parts import describe_error
from mlx_openelm.reporting.charts import Point

_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_ITERATION = re.compile(
    r"\[\s*([\d,]+)\s*/\s*[\d,]+\s*\]|\biter(?:ation)?s?\b[\s:=]*([\d,]+)",
    re.IGNORECASE,
)
_LOSS = re.compile(
    r"([a-z_]*loss)['\"]?\s*[:=]\s*(\d+(?:\.\d*)?(?:e[-+]?\d+)?)", re.IGNORECASE
)
_OTHER = re.compile(r"validation|evaluation", re.IGNORECASE)
_PREFERRED = ("ce_loss", "cross_entropy_loss", "lm_loss", "total_loss", "loss")


def read_compared_losses(path: Path) -> list[Point]:
    """Return the training loss by step.

    Raises:
        OpenELMError: the file cannot be read, or no line has a step and a loss.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise OpenELMError(
            f"Cannot read the log {path}: {describe_error(error)}."
        ) from error
    losses: dict[float, float | None] = {}
    for line in text.splitlines():
        is_json = line.startswith("{")
        point = _read_record(line) if is_json else _read_line(line)
        if point is not None:
            losses[point[0]] = point[1]
    if not losses:
        raise OpenELMError(
            f"No line of {path} has an iteration, such as [500/350000], and a loss; "
            "`compare_log` needs CoreNet's training_logs.txt, or a metrics.jsonl."
        )
    return sorted(losses.items())


def _read_line(line: str) -> Point | None:
    line = _COLORS.sub("", line)
    iteration = _ITERATION.search(line)
    if iteration is None or _OTHER.search(line):
        return None
    losses = {name.lower(): float(value) for name, value in _LOSS.findall(line)}
    names = [name for name in (*_PREFERRED, *losses) if name in losses]
    if not names:
        return None
    step = (iteration[1] or iteration[2]).replace(",", "")
    return float(step), losses[names[0]]


def _read_record(line: str) -> Point | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    match record:
        case {"event": "trained", "step": int(step), "loss": int() | float() as loss}:
            return float(step), float(loss)
    return None
