"""What a fine-tuning run keeps on disk, so that it can be killed at any moment.

All that is needed to go on stands in one file, which is written beside the old one and
takes its name when it is whole:

    state.safetensors   trained weights, optimizer, and how far the run is
    running.json        there while a process trains; left behind only by a death
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

    def add_update(self, totals: Totals) -> None:
        """Count a batch that changed the weights."""
        self.skipped_in_row = 0
        self.tokens += totals.count
        self.window_loss += totals.loss
        self.window_tokens += totals.count
        self.window_wins += totals.wins
        self.window_margin += totals.margin

    def add_skipped(self) -> None:
        """Count a batch that changed nothing."""
        self.skipped += 1
        self.skipped_in_row += 1

    def start_window(self) -> None:
        """Begin what the next report is about."""
        self.reported = self.seconds
        self.window_loss = self.window_wins = self.window_margin = 0.0
        self.window_tokens = 0


@dataclass(frozen=True, slots=True)
class SavedState:
    """A saved run.

    Attributes:
        run: what must be the same to go on: digests of the data, the kind of machine.
    """

    progress: TrainingProgress
    trained: Mapping[str, mx.array]
    optimizer: Mapping[str, mx.array]
    run: Mapping[str, Any]


@dataclass(slots=True)
class TrainingState:
    """All that updates change: a model's trained weights, optimizer and progress."""

    model: OpenELM
    optimizer: optim.Optimizer
    progress: TrainingProgress = field(default_factory=TrainingProgress)

    def save(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Replace the folder's state; until the new one is whole the old one stays.

        Raises:
            OSError: the disk refuses; the old state is as it was.
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
        """Go on from the folder's state, which the first process reads for all.

        Raises:
            OpenELMError: it is damaged, or of another model.
        """
        trained, optimizer = trained_tensors(self.model), flatten(self.optimizer.state)
        state = SavedState(self.progress, trained, optimizer, {})
        if world.rank == 0:
            state = load_state(folder)
            for ours, saved in ((trained, state.trained), (optimizer, state.optimizer)):
                if _shapes(ours) != _shapes(saved):
                    raise OpenELMError(
                        f"The state in {folder} is of another model or recipe; begin "
                        "anew with `force`."
                    )
        progress = world.tell(json.dumps(dataclasses.asdict(state.progress)))
        self.progress = TrainingProgress(**json.loads(progress))
        weights = [(n, world.from_first(a)) for n, a in state.trained.items()]
        self.model.update(tree_unflatten(weights))
        self.optimizer.state = tree_map_with_path(
            lambda path, _: world.from_first(state.optimizer[path]),
            self.optimizer.state,
        )


def _shapes(arrays: Mapping[str, mx.array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


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


def load_state(folder: Path) -> SavedState:
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
        return SavedState(
            progress=TrainingProgress(**saved),
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
