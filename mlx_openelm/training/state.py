"""The saved state of a training run, from which a killed run resumes exactly.

state.safetensors   trained weights, optimizer and progress; replaced atomically
running.json        exists while a process trains; it remains if that is killed
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import safetensors
from mlx.utils import tree_map_with_path, tree_unflatten

from mlx_openelm import openblas
from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import parse_json
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.adapter_folder import save_tensors
from mlx_openelm.storage.staging import flush, replaced_file
from mlx_openelm.training.arrays import flatten, trained_tensors
from mlx_openelm.training.distributed import World
from mlx_openelm.training.objective import Totals

STATE, RUNNING = "state.safetensors", "running.json"
_FORMAT = 1


@dataclass(slots=True)
class TrainingProgress:
    """The counters of a run, saved with its weights and optimizer.

    Attributes:
        step: number of updates, skipped batches included.
        tokens: number of trained target tokens (or preference pairs).
        seconds: training time, without validation.
        window_loss, window_tokens, window_wins, window_margin: totals since the last
            report.
        reported: `seconds` at the last report.
        best_loss, best_step: of validation; infinity and 0 before the first one.
        evals_since_best: validations without an improvement, for early stopping.
        evaluated_step: step of the last validation; -1 before the first one.
        skipped: batches that were skipped because loss or gradient was not finite.
        skipped_in_row: length of the current run of skipped batches.
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

    def add_update(self, totals: Totals) -> None:
        """Add the totals of an applied update."""
        self.skipped_in_row = 0
        self.tokens += totals.count
        self.window_loss += totals.loss
        self.window_tokens += totals.count
        self.window_wins += totals.wins
        self.window_margin += totals.margin

    def add_skipped(self) -> None:
        """Count a skipped batch."""
        self.skipped += 1
        self.skipped_in_row += 1

    def start_window(self) -> None:
        """Reset the totals since the last report."""
        self.reported = self.seconds
        self.window_loss = self.window_wins = self.window_margin = 0.0
        self.window_tokens = 0


@dataclass(frozen=True, slots=True)
class SavedState:
    """The contents of state.safetensors.

    Attributes:
        trained: trained weights by name.
        optimizer: optimizer state by path.
        run: identity of the run, compared on resume: data digest and arithmetic.
    """

    progress: TrainingProgress
    trained: Mapping[str, mx.array]
    optimizer: Mapping[str, mx.array]
    run: Mapping[str, Any]


@dataclass(slots=True)
class TrainingState:
    """What an update changes: trained weights, optimizer state and progress."""

    model: OpenELM
    optimizer: optim.Optimizer
    progress: TrainingProgress = field(default_factory=TrainingProgress)

    def save(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Replace the folder's state atomically.

        Raises:
            OSError: the state cannot be written; the old one is unchanged.
        """
        progress = {
            name: None if value == math.inf else value
            for name, value in dataclasses.asdict(self.progress).items()
        }
        metadata = {"format": _FORMAT, "progress": progress, "run": dict(run)}
        trained, optimizer = trained_tensors(self.model), flatten(self.optimizer.state)
        tensors = {f"trained.{name}": array for name, array in trained.items()}
        tensors |= {f"optimizer.{name}": array for name, array in optimizer.items()}
        with replaced_file(folder / STATE) as path:
            save_tensors(
                path, tensors, format="mlx", metadata={"state": json.dumps(metadata)}
            )

    def restore(self, folder: Path, world: World) -> None:
        """Restore the folder's state; rank 0 reads it and broadcasts it.

        Raises:
            OpenELMError: the state is damaged, or belongs to another model.
        """
        trained, optimizer = trained_tensors(self.model), flatten(self.optimizer.state)
        state = SavedState(self.progress, trained, optimizer, {})
        if world.rank == 0:
            state = load_state(folder)
            for ours, saved in ((trained, state.trained), (optimizer, state.optimizer)):
                if _shapes(ours) != _shapes(saved):
                    raise OpenELMError(
                        f"The state in {folder} belongs to another model or recipe; "
                        "use `force` to start again."
                    )
        progress = world.broadcast_text(json.dumps(dataclasses.asdict(state.progress)))
        self.progress = TrainingProgress(**json.loads(progress))
        weights = [(n, world.broadcast(a)) for n, a in state.trained.items()]
        self.model.update(tree_unflatten(weights))
        self.optimizer.state = tree_map_with_path(
            lambda path, _: world.broadcast(state.optimizer[path]),
            self.optimizer.state,
        )


def _shapes(arrays: Mapping[str, mx.array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def describe_arithmetic() -> dict[str, Any]:
    """Return what rounding depends on; equal values give bit-identical results."""
    return {
        "device": str(mx.default_device().type).rpartition(".")[2],
        "blas": str(openblas.ACTIVE),
        "kernels": openblas.KERNELS,
        "threads": _count_threads(),
        "mlx": version("mlx"),
    }


def _count_threads() -> int:
    limit = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    if limit and limit.isdigit():
        return int(limit)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def load_state(folder: Path) -> SavedState:
    """Read the folder's state.

    Raises:
        OpenELMError: the state is missing, damaged or of another version.
    """
    path = folder / STATE
    if not path.is_file():
        raise OpenELMError(
            f"{folder} has no {STATE}, so there is no run to resume; leave out "
            "`resume` to start one."
        )
    unreadable = OpenELMError(
        f"{path} is damaged or was written by another version of mlx-openelm; use "
        "`force` to start again."
    )
    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            metadata = parse_json(opened.metadata()["state"])
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        mx.eval(arrays)
        if metadata["format"] != _FORMAT:
            raise unreadable
        saved = metadata["progress"]
        saved["best_loss"] = (
            math.inf if saved["best_loss"] is None else saved["best_loss"]
        )
        return SavedState(
            progress=TrainingProgress(**saved),
            trained=_with_prefix("trained.", arrays),
            optimizer=_with_prefix("optimizer.", arrays),
            run=metadata["run"],
        )
    except (
        *(KeyError, TypeError, ValueError, RuntimeError, OSError),
        safetensors.SafetensorError,
    ) as error:
        raise unreadable from error


def _with_prefix(prefix: str, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


# Detection of killed processes ---------------------------------------------------


@contextlib.contextmanager
def running(folder: Path) -> Iterator[bool]:
    """Mark the folder as in training; yield whether the last process was killed."""
    path = folder / RUNNING
    was_killed = path.exists()
    with contextlib.suppress(OSError):  # a full disk
        path.write_text(json.dumps({"pid": os.getpid()}) + "\n")
        flush(path)
    try:
        yield was_killed
    finally:
        path.unlink(missing_ok=True)
