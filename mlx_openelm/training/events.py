"""The events of a training run, stored as lines of metrics.jsonl.

Each event has its kind ("event") and "step". On resume, events after the saved state
are dropped.
"""

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_openelm.input_files import parse_json
from mlx_openelm.storage.staging import replaced_file
from mlx_openelm.training.distributed import World
from mlx_openelm.training.state import TrainingProgress, TrainingState

METRICS = "metrics.jsonl"

Event = Mapping[str, Any]


class EventLog:
    """Writes events to the run's folder and passes them to `on_event`, on rank 0 only.

    Args:
        steps: number of steps in the run; `on_event` receives it with each event.
    """

    def __init__(
        self,
        folder: Path,
        state: TrainingState,
        *,
        steps: int,
        world: World,
        on_event: Callable[[Event], None],
    ) -> None:
        self._folder, self._state, self._steps = folder, state, steps
        self._world, self._on_event = world, on_event

    def emit(self, kind: str, **values: Any) -> None:
        """Record an event of the current step."""
        if self._world.rank == 0:
            event = {"event": kind, "step": self._state.progress.step, **values}
            append_event(self._folder, event)
            self._on_event({**event, "steps": self._steps})

    def note(self, text: str) -> None:
        """Record a message for the user."""
        self.emit("note", text=text)


def append_event(folder: Path, event: Mapping[str, Any]) -> None:
    """Append a line to the folder's metrics.jsonl; non-finite floats become null.

    Write errors are ignored, so that a full disk does not stop the run.
    """
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in event.items()
    }
    with (
        contextlib.suppress(OSError),
        (folder / METRICS).open("a", encoding="utf-8") as opened,
    ):
        opened.write(json.dumps(finite, ensure_ascii=False) + "\n")


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the folder's events, without incomplete lines of a killed process."""
    path = folder / METRICS
    events: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                event = parse_json(line)
                if isinstance(event, dict) and _is_event(event):
                    events.append(event)
    return events


def _is_event(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("step"), int) and isinstance(row.get("event"), str)


def drop_events_after(folder: Path, progress: TrainingProgress) -> None:
    """Remove the events after a saved state, before training resumes from it."""
    kept = [
        event
        for event in read_events(folder)
        if event["step"] <= progress.step
        and not (
            event["event"] in ("eval", "sample")
            and event["step"] > progress.evaluated_step
        )
    ]
    lines = [json.dumps(event, ensure_ascii=False) + "\n" for event in kept]
    with replaced_file(folder / METRICS) as path:
        path.write_text("".join(lines), encoding="utf-8")
