"""Validation of a fine-tuning run, and its sample texts."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_openelm.finetuning.run_context import RunContext
from mlx_openelm.finetuning.run_saver import RunSaver
from mlx_openelm.finetuning.samples import Samples
from mlx_openelm.training.objective import Totals


@dataclass(frozen=True, slots=True)
class Validation:
    """Mean loss, in nats, and for pairs the share with a positive margin."""

    loss: float
    accuracy: float | None = None


class Validator:
    """Validates a run, saves its best adapter, and decides on early stopping.

    Args:
        valid: samples of the objective; can be empty.
        continue_text: generates the continuation of a prompt.
    """

    def __init__(
        self,
        run: RunContext,
        valid: Samples,
        saver: RunSaver,
        continue_text: Callable[[str], str],
    ) -> None:
        self._run, self._saver, self._continue_text = run, saver, continue_text
        limit = run.recipe.val_batches * run.recipe.batch_size
        self._valid = valid if limit < 0 else valid[:limit]

    def run_step(self) -> None:
        """Validate and continue the recipe's prompts, at most once per step."""
        run, progress = self._run, self._run.progress
        if progress.evaluated_step == progress.step:
            return
        progress.evaluated_step = progress.step
        if self._valid:
            self._validate()
        for prompt in run.recipe.sample_prompt if run.world.rank == 0 else ():
            run.log.emit("sample", prompt=prompt, text=self._continue_text(prompt))

    def _validate(self) -> None:
        progress, result = self._run.progress, self.evaluate(self._valid)
        best = result.loss < progress.best_loss  # false for NaN
        if best:
            progress.best_loss, progress.best_step = result.loss, progress.step
            progress.evals_since_best = 0
            self._saver.save_best()
        else:
            progress.evals_since_best += 1
        accuracy = {} if result.accuracy is None else {"accuracy": result.accuracy}
        self._run.log.emit(
            "eval", loss=result.loss, **accuracy, tokens=progress.tokens, best=best
        )

    def evaluate(self, samples: Samples) -> Validation:
        """Return the mean loss of samples, which all processes share."""
        run, totals, size = self._run, Totals(), self._run.recipe.batch_size
        starts = range(0, len(samples), size)
        for start in starts[run.world.rank :: run.world.size]:
            batch = run.objective.collate(samples[start : start + size])
            totals.add(run.objective.evaluate(run.model, batch))
        sums = mx.array([totals.loss, totals.count, totals.wins], mx.float32)
        loss, count, wins = np.array(run.world.sum(sums), np.float64).tolist()
        accuracy = wins / count if run.objective.pairwise else None
        return Validation(loss / count, accuracy)

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` validations were not improvements."""
        patience = self._run.recipe.patience
        return patience is not None and self._run.progress.evals_since_best >= patience
