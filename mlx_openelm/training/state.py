"""What a fine-tuning run keeps on disk, so that it can be killed at any moment.

All that is needed to go on stands in one file, which is written beside the old one and
takes its name when it is whole:

    state.safetensors   trained weights, optimizer, and how far the run is
    metrics.jsonl       an event a line; what is newer than the state is dropped later
    running.json        there while a process trains; left behind only by a death
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import safetensors

from mlx_openelm import openblas
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.adapter_folder import save_tensors
from mlx_openelm.storage.staging import flush, replaced_file

STATE, METRICS, RUNNING = "state.safetensors", "metrics.jsonl", "running.json"
_FORMAT = 1


@dataclass(slots=True)
class Progress:
    """How far a run is: what the next step needs, beside weights and optimizer.

    Attributes:
        step: updates made.
        tokens: trained tokens (of preferences: pairs) so far.
        seconds: spent on training, without validation.
        window_loss, window_tokens, window_wins, window_margin: since the last report.
        reported: seconds at that report.
        best_loss, best_step: of the validation; infinity where there was none.
        evals_since_best: for early stopping.
        evaluated_step: when the validation was computed last.
        skipped: batches left out because something was not finite.
        skipped_in_row: the last so many of them.
        peak_memory: bytes.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    window_loss: float = 0.0
    window_tokens: int = 0
    window_wins: float = 0.0
    window_margin: float = 0.0
    reported: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    evals_since_best: int = 0
    evaluated_step: int = -1
    skipped: int = 0
    skipped_in_row: int = 0
    peak_memory: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """A saved run.

    Attributes:
        run: what must be the same to go on: digests of the data, the kind of machine.
    """

    progress: Progress
    trained: Mapping[str, mx.array]
    optimizer: Mapping[str, mx.array]
    run: Mapping[str, Any]


def describe_arithmetic() -> dict[str, Any]:
    """Return what the last bits of a sum depend on: the same here, the same bits."""
    return {
        "device": str(mx.default_device().type).rpartition(".")[2],
        "blas": str(openblas.ACTIVE),
        "kernels": openblas.KERNELS,
        "threads": _count_threads(),
        "mlx": version("mlx"),
    }


def _count_threads() -> int:
    said = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    if said and said.isdigit():
        return int(said)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def save_state(folder: Path, state: State) -> None:
    """Replace the folder's state; until the new one is whole the old one stays.

    Raises:
        OSError: the disk refuses; the old state is as it was.
    """
    progress = {
        name: None if value == math.inf else value
        for name, value in dataclasses.asdict(state.progress).items()
    }
    tensors = {f"trained.{name}": array for name, array in state.trained.items()}
    tensors |= {f"optimizer.{name}": array for name, array in state.optimizer.items()}
    metadata = {"format": _FORMAT, "progress": progress, "run": dict(state.run)}
    with replaced_file(folder / STATE) as path:
        save_tensors(
            path, tensors, format="mlx", metadata={"state": json.dumps(metadata)}
        )


def load_state(folder: Path) -> State:
    """Read the folder's state.

    Raises:
        OpenELMError: there is none, or it is damaged or of another version.
    """
    path = folder / STATE
    if not path.is_file():
        raise OpenELMError(
            f"{folder} holds no {STATE}, so there is nothing to go on from; leave out "
            "`resume` to begin."
        )
    wrong = OpenELMError(
        f"{path} is damaged or was written by another version of mlx-openelm; begin "
        "anew with `force`."
    )
    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            metadata = json.loads(opened.metadata()["state"])
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        mx.eval(arrays)
        if metadata["format"] != _FORMAT:
            raise wrong
        saved = metadata["progress"]
        saved["best_loss"] = (
            math.inf if saved["best_loss"] is None else saved["best_loss"]
        )
        return State(
            progress=Progress(**saved),
            trained=_below("trained.", arrays),
            optimizer=_below("optimizer.", arrays),
            run=metadata["run"],
        )
    except (
        *(KeyError, TypeError, ValueError, RuntimeError, OSError),
        safetensors.SafetensorError,
    ) as error:
        raise wrong from error


def _below(prefix: str, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


# Events --------------------------------------------------------------------------


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


def drop_events_after(folder: Path, progress: Progress) -> None:
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


# Deaths --------------------------------------------------------------------------


@contextlib.contextmanager
def running(folder: Path) -> Iterator[bool]:
    """Mark the folder while training; tells whether the last run in it has died."""
    path = folder / RUNNING
    died = path.exists()
    with contextlib.suppress(OSError):  # a full disk
        path.write_text(json.dumps({"pid": os.getpid()}) + "\n")
        flush(path)
    try:
        yield died
    finally:
        path.unlink(missing_ok=True)
