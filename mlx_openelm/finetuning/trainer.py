"""The training loop: one for LoRA, DoRA and full, for every objective.

A step takes its samples from the order of the run and updates the weights (`Step`).
`TrainingProgress` is saved with weights and optimizer, so that a run can be resumed
exactly.
"""

import math
import signal
import time
from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.advice import describe_resume, explain_out_of_memory
from mlx_openelm.finetuning.batches import share_out
from mlx_openelm.finetuning.run_context import RunContext
from mlx_openelm.finetuning.run_saver import RunSaver
from mlx_openelm.finetuning.samples import Samples, lengths_of
from mlx_openelm.finetuning.trainable import use_dropout
from mlx_openelm.finetuning.validation import Validator
from mlx_openelm.signals import Stop, deferred_signals
from mlx_openelm.training.arrays import digest_arrays, trained_tensors
from mlx_openelm.training.non_finite import refuse_repeated
from mlx_openelm.training.step import Part, Step, StepResult


class Trainer:
    """The loop over the steps of a run.

    Args:
        run: its weights are still those of the start.
        train: samples of the objective.
    """

    def __init__(
        self, run: RunContext, train: Samples, saver: RunSaver, validator: Validator
    ) -> None:
        self._run, self._train = run, train
        self._saver, self._validator = saver, validator
        self._lengths = lengths_of(train)
        self._step = Step(
            run.model,
            run.objective,
            run.state.optimizer,
            run.world,
            clip_norm=run.recipe.clip_norm,
        )
        self._initial_digest = digest_arrays(trained_tensors(run.model))

    def run(self) -> str:
        """Train to the end; return why it ended: "done" or "patience".

        Raises:
            OpenELMError: three batches in a row are not finite, the weights are not, or
                nothing was learnt.
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came; all is saved, and a
                note says how to go on.
        """
        try:
            with deferred_signals() as stop:
                reason = self._loop(stop)
        except (KeyboardInterrupt, SystemExit) as stopped:
            if not getattr(stopped, "__notes__", ()):  # the second one, at once
                kept = self._saver.describe().capitalize()
                stopped.add_note(f"{kept} {describe_resume(self._run.folder)}")
            raise
        self._refuse_unchanged()
        self._saver.save(last=True)
        self._saver.save_average()
        self._run.log.emit("end", reason=reason)
        return reason

    def _loop(self, stop: Stop) -> str:
        recipe, progress = self._run.recipe, self._run.progress
        steps = self._run.order.steps
        stopping = False
        while True:
            if stopping and progress.step < steps:
                self._leave(stop.number or signal.SIGTERM)
            last = progress.step == steps
            if progress.step % recipe.steps_per_eval == 0 or last:
                self._validator.run_step()
            if progress.step % recipe.save_every == 0 and progress.step and not last:
                self._saver.save()
            if last or self._validator.out_of_patience:
                return "done" if last else "patience"
            if self._run.world.size == 1 and stop.number is not None:
                stopping = True
                continue
            with explain_out_of_memory(progress.step + 1, recipe, self._saver.describe):
                result = self.update(stop)
            stopping = result.stop
            if progress.step % recipe.steps_per_report == 0 or progress.step == steps:
                self._report(result.norm)

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
        """Yield this process's parts of a step, each with its own dropout."""
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
        refuse_repeated(progress, places, self._saver.describe())

    def _report(self, norm: float) -> None:
        """Report the updates since the last report."""
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
            **(pairs if run.objective.compares else {}),
            tokens=progress.tokens,
            tokens_per_second=round(window / seconds, 2),
            memory_bytes=mx.get_active_memory() + mx.get_cache_memory(),
            peak_memory_bytes=progress.peak_memory,
            seconds=round(progress.seconds, 3),
        )

    def _leave(self, number: int) -> None:
        step = self._run.progress.step
        kept = self._saver.up_to_date or self._saver.save()
        self._run.log.emit("end", reason="interrupted")
        leaving: BaseException = (
            KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        )
        said = f"Saved at step {step}." if kept else self._saver.describe().capitalize()
        leaving.add_note(f"{said} {describe_resume(self._run.folder)}")
        raise leaving

    def _refuse_unchanged(self) -> None:
        progress = self._run.progress
        if digest_arrays(trained_tensors(self._run.model)) == self._initial_digest:
            raise OpenELMError(
                f"After {progress.step} steps the adapter is what it was at the "
                "start: nothing was learnt. Look at `learning_rate` and the data; "
                f"{progress.skipped} batches were skipped."
            )
