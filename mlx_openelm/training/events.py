"""The events of a training run: metrics.jsonl, one a line.

Each has "event", its kind, and "step". What is newer than the saved state is dropped
when the run is resumed.
"""

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_openelm.storage.staging import replaced_file
from mlx_openelm.training.distributed import World
from mlx_openelm.training.state import TrainingProgress, TrainingState

METRICS = "metrics.jsonl"

Event = Mapping[str, Any]


class EventLog:
    """Writes events into a run's folder and passes them on, in the first process alone.

    Args:
        steps: of the whole run; `on_event` gets it with each event.
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
        """Write an event of the current step, and pass it on."""
        if self._world.rank == 0:
            event = {"event": kind, "step": self._state.progress.step, **values}
            append_event(self._folder, event)
            self._on_event({**event, "steps": self._steps})

    def note(self, text: str) -> None:
        """Write a sentence, and pass it on."""
        self.emit("note", text=text)


def append_event(folder: Path, event: Mapping[str, Any]) -> None:
    """Add a line to the folder's metrics; what is not finite becomes null.

    A full disk loses the line, not the run.
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
    """Return the folder's events; a line that a death has cut is left out."""
    path = folder / METRICS
    events: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and _is_event(event):
                    events.append(event)
    return events


def _is_event(found: Mapping[str, Any]) -> bool:
    return isinstance(found.get("step"), int) and isinstance(found.get("event"), str)


def drop_events_after(folder: Path, progress: TrainingProgress) -> None:
    """Forget what came after the state that is gone on from."""
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
