"""Saving and restoring a fine-tuning run: state, adapter, best and average."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.adapter_snapshots import (
    AVERAGE,
    replace_copy,
    replace_weights,
    save_snapshot,
    write_average,
)
from mlx_openelm.finetuning.advice import advise_resume
from mlx_openelm.finetuning.run_context import RunContext
from mlx_openelm.finetuning.trainable import adapter_tensors
from mlx_openelm.storage.adapter_folder import BEST
from mlx_openelm.training.arrays import trained_tensors


class RunSaver:
    """Saves a run, on rank 0 only.

    Args:
        identity: data digest and arithmetic, stored with the state and compared when
            the run is resumed.
    """

    def __init__(self, run: RunContext, identity: Mapping[str, Any]) -> None:
        self._run, self._identity = run, identity
        self._saved_step = -1

    @property
    def up_to_date(self) -> bool:
        """Whether the state of the current step is saved."""
        return self._saved_step == self._run.progress.step

    def describe_saved(self) -> str:
        """Return a sentence that states what is saved."""
        if self._saved_step <= 0:
            return "Only the initial state is saved."
        return f"The state of step {self._saved_step} is saved in {self._run.folder}."

    def save_start(self, folder: Path) -> None:
        """Save the state before the first step into the run's staging folder.

        Raises:
            OSError: the state cannot be written.
        """
        self._run.state.save(folder, self._identity)

    def restore(self) -> None:
        """Restore the folder's state.

        Raises:
            OpenELMError: the state is damaged, or belongs to another model.
        """
        run = self._run
        run.state.restore(run.folder, run.world)
        self._saved_step = run.progress.step
        if run.world.rank == 0 and run.progress.step:
            self._save_adapter()  # a kill can come between state and adapter

    def save(self, *, last: bool = False) -> bool:
        """Save state and adapter; return whether they were written.

        Args:
            last: training has ended, so a write error is raised, not only reported.

        Raises:
            OpenELMError: a weight is not finite, or the last save failed.
        """
        run, step = self._run, self._run.progress.step
        trained = trained_tensors(run.model).values()
        if not all(mx.isfinite(array).all().item() for array in trained):
            raise OpenELMError(
                f"After step {step} the adapter contains NaN or infinity and is not "
                f"saved. Lower `learning_rate`. {self.describe_saved()}"
            )
        if run.world.rank > 0:
            return True
        try:
            run.state.save(run.folder, self._identity)
            if step:
                self._save_adapter(last=last)
        except OSError as error:
            if last:
                with contextlib.suppress(
                    OSError
                ):  # smaller than the state, so it may fit
                    self._save_adapter(last=True)
                raise OpenELMError(
                    f"The end of the run could not be saved: {error}. "
                    f"{self.describe_saved()} Free disk space. "
                    f"{advise_resume(run.folder)}"
                ) from error
            run.log.note(
                f"Step {step} could not be saved: {error}. Training continues. "
                f"{self.describe_saved()}"
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
        if recipe.average_last > 1 and (step % recipe.save_every == 0 or last):
            save_snapshot(self._run.folder, step, tensors, keep=recipe.average_last)

    def save_best(self) -> None:
        """Save the adapter as the best one so far."""
        if self._run.progress.step and self._run.world.rank == 0:
            with self._note_full_disk(BEST):
                replace_copy(self._run.folder, BEST, adapter_tensors(self._run.model))

    def save_average(self) -> None:
        """Save the mean of the last adapters if the recipe has `average_last`."""
        if self._run.recipe.average_last > 1 and self._run.world.rank == 0:
            with self._note_full_disk(AVERAGE):
                write_average(self._run.folder)

    @contextlib.contextmanager
    def _note_full_disk(self, name: str) -> Iterator[None]:
        """Report write errors of an additional adapter; training continues."""
        try:
            yield
        except OSError as error:
            path = self._run.folder / name
            self._run.log.note(f"{path} could not be written: {error}.")
