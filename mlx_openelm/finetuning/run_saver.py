"""Saves a fine-tuning run, and restores it: state, adapter, best and average."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.adapter_snapshots import (
    AVERAGE,
    keep,
    replace_copy,
    replace_weights,
    write_average,
)
from mlx_openelm.finetuning.run_context import RunContext
from mlx_openelm.finetuning.trainable import adapter_tensors
from mlx_openelm.storage.adapter_folder import BEST
from mlx_openelm.training.arrays import trained_tensors


class RunSaver:
    """Writes what is kept of a run, in the first process alone.

    Args:
        identity: what must be the same when the run goes on, stored with its state.
    """

    def __init__(self, run: RunContext, identity: Mapping[str, Any]) -> None:
        self._run, self._identity = run, identity
        self._saved_step = -1

    @property
    def up_to_date(self) -> bool:
        """Whether the state of the current step is saved."""
        return self._saved_step == self._run.progress.step

    def describe(self) -> str:
        """Return a clause on what is saved."""
        if self._saved_step <= 0:
            return "nothing was saved yet but the start."
        return f"the state of step {self._saved_step} is in {self._run.folder}."

    def save_start(self, folder: Path) -> None:
        """Save the state before the first step, into a folder that will be the run's.

        Raises:
            OSError: the disk refuses.
        """
        self._run.state.save(folder, self._identity)

    def restore(self) -> None:
        """Go on from the folder's state, exactly.

        Raises:
            OpenELMError: it is damaged, or of another model.
        """
        run = self._run
        run.state.restore(run.folder, run.world)
        self._saved_step = run.progress.step
        if run.world.rank == 0 and run.progress.step:
            self._save_adapter()  # the kill may have come between state and adapter

    def save(self, *, last: bool = False) -> bool:
        """Save everything; return whether the disk took it.

        Raises:
            OpenELMError: the weights are not finite, or, the last time, the disk
                refuses.
        """
        run, step = self._run, self._run.progress.step
        trained = trained_tensors(run.model).values()
        if not all(mx.isfinite(array).all().item() for array in trained):
            raise OpenELMError(
                f"After step {step} the adapter holds NaN or infinity, and "
                f"is not saved; lower `learning_rate`; {self.describe()}"
            )
        if run.world.rank > 0:
            return True
        try:
            run.state.save(run.folder, self._identity)
            if step:
                self._save_adapter(last=last)
        except OSError as error:
            if last:
                with contextlib.suppress(OSError):  # it is smaller than the state
                    self._save_adapter(last=True)
                raise OpenELMError(
                    f"The end of the run could not be saved ({error}); make room, and "
                    f"go on with `resume`: {self.describe()}"
                ) from error
            run.log.note(
                f"Step {step} could not be saved ({error}); the run goes on, and "
                f"{self.describe()}"
            )
            return False
        self._saved_step = step
        if step:
            run.log.emit("save")
        return True

    def _save_adapter(self, *, last: bool = False) -> None:
        recipe, step = self._run.recipe, self._run.progress.step
        tensors = adapter_tensors(self._run.model)
        replace_weights(self._run.folder, tensors)
        due = step % recipe.save_every == 0 or last
        if recipe.average_last > 1 and due:
            keep(self._run.folder, step, tensors, most=recipe.average_last)

    def save_best(self) -> None:
        """Save the adapter as the best one so far."""
        if self._run.progress.step and self._run.world.rank == 0:
            with self._note_full_disk(BEST):
                replace_copy(self._run.folder, BEST, adapter_tensors(self._run.model))

    def save_average(self) -> None:
        """Save the mean of the last adapters, where the recipe asks for it."""
        if self._run.recipe.average_last > 1 and self._run.world.rank == 0:
            with self._note_full_disk(AVERAGE):
                write_average(self._run.folder)

    @contextlib.contextmanager
    def _note_full_disk(self, name: str) -> Iterator[None]:
        """A full disk costs what is beside the run, not the run."""
        try:
            yield
        except OSError as error:
            path = self._run.folder / name
            self._run.log.note(f"{path} could not be written: {error}.")
