"""The training loop, for every method (LoRA, DoRA, full) and every objective."""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

import mlx.core as mx

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.advice import advise_resume, explain_out_of_memory
from mlx_openelm.finetuning.batches import share_out
from mlx_openelm.finetuning.compiled.choice import make_step
from mlx_openelm.finetuning.run_context import RunContext
from mlx_openelm.finetuning.run_saver import RunSaver
from mlx_openelm.finetuning.samples import Samples, lengths_of
from mlx_openelm.finetuning.trainable import use_dropout
from mlx_openelm.finetuning.validation import Validator
from mlx_openelm.message_parts import count_of
from mlx_openelm.signals import Stop, deferred_signals
from mlx_openelm.training.arrays import digest_arrays, trained_tensors
from mlx_openelm.training.non_finite import refuse_repeated
from mlx_openelm.training.step import Part, StepResult


class Trainer:
    """Trains a run to its end.

    Args:
        run: a run whose weights are still the initial ones.
        train: samples of the objective.
    """

    def __init__(
        self, run: RunContext, train: Samples, saver: RunSaver, validator: Validator
    ) -> None:
        self._run, self._train = run, train
        self._saver, self._validator = saver, validator
        self._lengths = lengths_of(train)
        self._step = make_step(run, train, self._lengths)
        self._initial_digest = digest_arrays(trained_tensors(run.model))

    def run(self) -> str:
        """Train to the end; return why training ended: "done" or "patience".

        Raises:
            OpenELMError: too many batches in a row or the weights are not finite, or
                training has changed no weight.
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM; the run is saved, and a
                note of the exception has the command that resumes it.
        """
        try:
            with deferred_signals() as stop:
                reason = self._train_steps(stop)
        except (KeyboardInterrupt, SystemExit) as interrupt:
            if not getattr(interrupt, "__notes__", ()):  # a second signal, not deferred
                self._add_resume_note(interrupt, self._saver.describe_saved())
            raise
        self._refuse_unchanged()
        self._saver.save(last=True)
        self._saver.save_average()
        self._run.log.emit("end", reason=reason)
        return reason

    def _train_steps(self, stop: Stop) -> str:
        """Make updates, validate, save and report; return why training ended."""
        recipe, progress = self._run.recipe, self._run.progress
        steps = self._run.order.steps
        while True:
            last = progress.step == steps
            if progress.step % recipe.steps_per_eval == 0 or last:
                self._validator.run_step()
            if progress.step % recipe.save_every == 0 and progress.step and not last:
                self._saver.save()
            if last or self._validator.out_of_patience:
                return "done" if last else "patience"
            if self._run.world.size == 1 and stop.number is not None:
                self._interrupt(stop)  # a signal during validation or saving
            with explain_out_of_memory(
                self._run.folder,
                progress.step + 1,
                recipe,
                self._saver.describe_saved,
            ):
                result = self.update(stop)
            if progress.step % recipe.steps_per_report == 0 or progress.step == steps:
                self._report(result.norm)
            if result.stop and progress.step < steps:
                self._interrupt(stop)

    def update(self, stop: Stop) -> StepResult:
        """Make one update, or skip its batch."""
        run, progress = self._run, self._run.progress
        started = time.perf_counter()
        indices = run.order.batch(progress.step)
        result = self._step.update(
            self._parts(indices),
            learning_rate=run.recipe.rate_at(progress.step, run.order.steps),
            stop=lambda: stop.number is not None,
        )
        progress.step += 1
        if result.applied:
            progress.add_update(result.totals)
        else:
            self._skip(indices, result)
        progress.seconds += time.perf_counter() - started
        progress.peak_memory = max(progress.peak_memory, mx.get_peak_memory())
        return result

    def _parts(self, indices: Sequence[int]) -> Iterator[Part]:
        """Yield this process's micro-batches of a step, each with its own dropout."""
        run, count = self._run, self._run.recipe.grad_accumulation_steps
        shares = share_out(indices, self._lengths, count * run.world.size)
        for part in range(run.world.rank * count, (run.world.rank + 1) * count):
            if shares[part]:
                use_dropout(run.model, run.recipe.seed, run.progress.step, part)
                yield Part(part, shares[part], [self._train[i] for i in shares[part]])
        use_dropout(run.model)

    def _skip(self, indices: Sequence[int], result: StepResult) -> None:
        progress = self._run.progress
        progress.add_skipped()
        places = [self._train[i].place for i in result.non_finite or indices]
        self._run.log.emit(
            "skip", loss=result.totals.loss, grad_norm=result.norm, samples=places
        )
        refuse_repeated(progress, places, self._saver.describe_saved())

    def _report(self, norm: float) -> None:
        """Log the means over the updates since the last report."""
        run, progress = self._run, self._run.progress
        window = progress.window_tokens
        count = max(1, window)
        seconds = max(progress.seconds - progress.reported, 1e-9)
        pairs = {
            "accuracy": progress.window_wins / count,
            "margin": progress.window_margin / count,
        }
        loss = progress.window_loss / count if window else math.nan
        progress.start_window()
        run.log.emit(
            "step",
            epoch=round(run.order.epoch_after(progress.step), 4),
            loss=loss,
            learning_rate=run.recipe.rate_at(progress.step - 1, run.order.steps),
            grad_norm=norm,
            **(pairs if run.objective.pairwise else {}),
            tokens=progress.tokens,
            tokens_per_second=round(window / seconds, 2),
            memory_bytes=mx.get_active_memory() + mx.get_cache_memory(),
            peak_memory_bytes=progress.peak_memory,
            seconds=round(progress.seconds, 3),
        )

    def _interrupt(self, stop: Stop) -> NoReturn:
        """Save the run and raise the exception of the signal."""
        number = stop.number or signal.SIGTERM  # None: another process received it
        saved = self._saver.up_to_date or self._saver.save()
        self._run.log.emit("end", reason="interrupted")
        interrupt: BaseException = (
            KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        )
        step = self._run.progress.step
        self._add_resume_note(
            interrupt,
            f"Saved at step {step}." if saved else self._saver.describe_saved(),
        )
        raise interrupt

    def _add_resume_note(self, interrupt: BaseException, saved: str) -> None:
        interrupt.add_note(f"{saved} {advise_resume(self._run.folder)}")

    def _refuse_unchanged(self) -> None:
        progress = self._run.progress
        if digest_arrays(trained_tensors(self._run.model)) == self._initial_digest:
            raise OpenELMError(
                f"Training changed no weight in {count_of(progress.step, 'step')} "
                f"(skipped batches: {progress.skipped}). Check `learning_rate` and the "
                "data."
            )
