"""The training loop: one for LoRA, DoRA and full, for every objective.

A step takes its samples from the order of the run and updates the weights (`Step`).
`Progress` is saved with weights and optimizer, so that a run can be resumed exactly.
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path, tree_unflatten

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.adapter_snapshots import (
    AVERAGE,
    keep,
    replace_copy,
    replace_weights,
    write_average,
)
from mlx_openelm.finetuning.advice import describe_resume, explain_out_of_memory
from mlx_openelm.finetuning.batches import share_out
from mlx_openelm.finetuning.objectives import make_objective
from mlx_openelm.finetuning.plan import Order
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.samples import Pair, Sample, lengths_of
from mlx_openelm.finetuning.trainable import (
    adapter_tensors,
    trained_tensors,
    use_dropout,
)
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import generate
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.signals import Stop, deferred_signals
from mlx_openelm.storage.adapter_folder import BEST
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.training.arrays import digest_arrays, flatten
from mlx_openelm.training.distributed import World
from mlx_openelm.training.non_finite import count_skipped, refuse_repeated
from mlx_openelm.training.objective import Totals
from mlx_openelm.training.optimizer import make_optimizer
from mlx_openelm.training.state import (
    Progress,
    State,
    append_event,
    load_state,
    save_state,
)
from mlx_openelm.training.step import Part, Step

Event = Mapping[str, Any]
Samples = Sequence[Sample] | Sequence[Pair]


@dataclass(frozen=True, slots=True)
class Validation:
    """Mean loss in nats per token that counts (of preferences: per pair)."""

    loss: float
    tokens: int
    accuracy: float | None = None


class Training:
    """A run in memory.

    Args:
        folder: where it is saved; exists, with its config.
        train, valid, test: samples, or pairs for the objective "dpo".
        run: what must be the same when the run goes on, stored with its state.
    """

    def __init__(
        self,
        model: OpenELM,
        tokenizer: Tokenizer,
        recipe: FinetuneRecipe,
        order: Order,
        train: Samples,
        valid: Samples,
        test: Samples,
        folder: Path,
        run: Mapping[str, Any],
        *,
        world: World,
        sampling: Sampling,
        on_event: Callable[[Event], None],
    ) -> None:
        self.model, self.tokenizer, self.recipe = model, tokenizer, recipe
        self.order, self.folder, self.world = order, folder, world
        self.progress = Progress()
        self.optimizer = make_optimizer(
            model, recipe.optimizer, recipe.betas, recipe.eps, recipe.weight_decay
        )
        self._run, self._sampling, self._on_event = run, sampling, on_event
        self._train, self._valid = train, valid
        self._lengths = lengths_of(train)
        self._window = Totals()
        self._last: dict[str, float] = {}
        self._saved_step = -1
        self._initial_digest = digest_arrays(trained_tensors(self.model))
        self.objective = make_objective(recipe, model, [*train, *valid, *test])
        self._step = Step(
            model, self.objective, self.optimizer, world, clip_norm=recipe.clip_norm
        )

    # Going on ------------------------------------------------------------------

    def restore(self) -> None:
        """Go on from the folder's state, exactly.

        Raises:
            OpenELMError: it is damaged, or of another model.
        """
        ours = trained_tensors(self.model), flatten(self.optimizer.state)
        if self.world.rank == 0:
            state = load_state(self.folder)
            for expected, found in zip(
                ours, (state.trained, state.optimizer), strict=True
            ):
                shapes = {name: array.shape for name, array in expected.items()}
                if shapes != {name: array.shape for name, array in found.items()}:
                    raise OpenELMError(
                        f"The state in {self.folder} is of another model or recipe; "
                        "begin anew with --force."
                    )
        else:
            state = State(self.progress, *ours, {})
        told = json.loads(self.world.tell(json.dumps(asdict(state.progress))))
        self.progress = Progress(**told)
        trained = {n: self.world.from_first(a) for n, a in state.trained.items()}
        self.model.update(tree_unflatten(list(trained.items())))
        self.optimizer.state = tree_map_with_path(
            lambda path, _: self.world.from_first(state.optimizer[path]),
            self.optimizer.state,
        )
        saved = self.progress
        self._window = Totals(
            saved.window_loss,
            saved.window_tokens,
            saved.window_wins,
            saved.window_margin,
        )
        self._saved_step = saved.step
        if self.world.rank == 0 and self.progress.step:
            self._save_adapter()  # the kill may have come between state and adapter

    def save_start(self, folder: Path) -> None:
        """Save the state before the first step, into a folder that will be ours.

        Raises:
            OSError: the disk refuses.
        """
        optimizer = flatten(self.optimizer.state)
        save_state(
            folder,
            State(self.progress, trained_tensors(self.model), optimizer, self._run),
        )

    # The run -------------------------------------------------------------------

    def run(self) -> str:
        """Train to the end; return why it ended: "done" or "patience".

        Raises:
            OpenELMError: three batches in a row are not finite, the weights are not, or
                nothing was learnt.
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came; all is saved, and a
                note says how to go on.
        """
        recipe, progress = self.recipe, self.progress
        try:
            with deferred_signals() as stop:
                reason = self._loop(stop)
        except (KeyboardInterrupt, SystemExit) as stopped:
            if not getattr(stopped, "__notes__", ()):  # the second one, at once
                kept = self._describe_kept().capitalize()
                stopped.add_note(f"{kept} {describe_resume(self.folder)}")
            raise
        self._refuse_unchanged()
        self.save(last=True)
        if recipe.average_last > 1 and self.world.rank == 0:
            with self._noting(AVERAGE):
                write_average(self.folder)
        self.emit({"event": "end", "step": progress.step, "reason": reason})
        return reason

    def _loop(self, stop: Stop) -> str:
        recipe, progress, world = self.recipe, self.progress, self.world
        steps = self.order.steps
        stopping = False
        while True:
            if stopping and progress.step < steps:
                self._leave(stop.number or signal.SIGTERM)
            last = progress.step == steps
            if progress.step % recipe.steps_per_eval == 0 or last:
                self._evaluate_and_sample()
            if progress.step % recipe.save_every == 0 and progress.step and not last:
                self.save()
            if last or self._ran_out_of_patience():
                return "done" if last else "patience"
            if world.size > 1 or stop.number is None:
                with explain_out_of_memory(
                    progress.step + 1, recipe, self._describe_kept
                ):
                    stopping = self._update(stop)
                done = progress.step == steps
                if progress.step % recipe.steps_per_report == 0 or done:
                    self._report()
            else:
                stopping = True

    def emit(self, event: Event) -> None:
        """Write an event into the metrics, and show it."""
        if self.world.rank == 0:
            append_event(self.folder, event)
            self._on_event({**event, "steps": self.order.steps})

    def note(self, text: str) -> None:
        """Write a sentence into the metrics, and show it."""
        self.emit({"event": "note", "step": self.progress.step, "text": text})

    def _update(self, stop: Stop) -> bool:
        """Make one update; return whether any process was asked to stop."""
        progress, recipe = self.progress, self.recipe
        started = time.perf_counter()
        indices = self.order.batch(progress.step)
        rate = recipe.rate_at(progress.step, self.order.steps)
        result = self._step.update(
            self._parts(indices),
            learning_rate=rate,
            stop=lambda: stop.number is not None,
        )
        progress.step += 1
        if result.applied:
            progress.skipped_in_row = 0
            progress.tokens += result.totals.count
            self._window.add(result.totals)
        else:
            skipped = result.non_finite or list(indices)
            self._skip(skipped, result.totals.loss, result.norm)
        self._last = {"learning_rate": rate, "grad_norm": result.norm}
        progress.seconds += time.perf_counter() - started
        progress.peak_memory = max(progress.peak_memory, mx.get_peak_memory())
        return result.stop

    def _parts(self, indices: Sequence[int]) -> Iterator[Part]:
        """Yield this process's parts of a step, each with its own dropout."""
        count = self.recipe.grad_accumulation_steps
        rank, size = self.world.rank, self.world.size
        shares = share_out(indices, self._lengths, count * size)
        for part in range(rank * count, (rank + 1) * count):
            if shares[part]:
                use_dropout(self.model, self.recipe.seed, self.progress.step, part)
                yield Part(part, shares[part], [self._train[i] for i in shares[part]])
        use_dropout(self.model)

    def _skip(self, indices: Sequence[int], loss: float, norm: float) -> None:
        progress = self.progress
        count_skipped(progress)
        places = [self._train[i].place for i in indices]
        self.emit(
            {
                "event": "skip",
                "step": progress.step,
                "loss": loss,
                "grad_norm": norm,
                "samples": places,
            }
        )
        refuse_repeated(progress, places, self._describe_kept())

    def _describe_kept(self) -> str:
        if self._saved_step <= 0:
            return "nothing was saved yet but the start."
        return f"the state of step {self._saved_step} is in {self.folder}."

    # What is shown -------------------------------------------------------------

    def _report(self) -> None:
        progress, window = self.progress, self._window
        count = max(1, window.count)
        seconds = max(progress.seconds - progress.reported, 1e-9)
        progress.reported = progress.seconds
        pairs = {"accuracy": window.wins / count, "margin": window.margin / count}
        self.emit(
            {
                "event": "step",
                "step": progress.step,
                "epoch": round(self.order.epoch_after(progress.step), 4),
                "loss": window.loss / count if window.count else math.nan,
                **self._last,
                **(pairs if self.objective.compares else {}),
                "tokens": progress.tokens,
                "tokens_per_second": round(window.count / seconds, 2),
                "memory_bytes": mx.get_active_memory() + mx.get_cache_memory(),
                "peak_memory_bytes": progress.peak_memory,
                "seconds": round(progress.seconds, 3),
            }
        )
        self._window = Totals()

    def _evaluate_and_sample(self) -> None:
        progress = self.progress
        if progress.evaluated_step == progress.step:
            return
        progress.evaluated_step = progress.step
        most = self.recipe.val_batches * self.recipe.batch_size
        samples = self._valid if most < 0 else self._valid[:most]
        if samples:
            found = self.evaluate(samples)
            best = found.loss < progress.best_loss  # NaN never is
            if best:
                progress.best_loss, progress.best_step = found.loss, progress.step
                progress.evals_since_best = 0
                if progress.step and self.world.rank == 0:
                    with self._noting(BEST):
                        replace_copy(self.folder, BEST, adapter_tensors(self.model))
            else:
                progress.evals_since_best += 1
            accuracy = {} if found.accuracy is None else {"accuracy": found.accuracy}
            self.emit(
                {
                    "event": "eval",
                    "step": progress.step,
                    "loss": found.loss,
                    **accuracy,
                    "tokens": progress.tokens,
                    "best": best,
                }
            )
        for prompt in self.recipe.sample_prompt if self.world.rank == 0 else ():
            text = generate(self.model, self.tokenizer, prompt, self._sampling)
            self.emit(
                {
                    "event": "sample",
                    "step": progress.step,
                    "prompt": prompt,
                    "text": text,
                }
            )

    def evaluate(self, samples: Samples) -> Validation:
        """Return the mean loss of samples, every process taking its part of them."""
        totals, size = Totals(), self.recipe.batch_size
        starts = range(0, len(samples), size)
        for start in starts[self.world.rank :: self.world.size]:
            batch = self.objective.collate(samples[start : start + size])
            totals.add(self.objective.evaluate(self.model, batch))
        figures = mx.array([totals.loss, totals.count, totals.wins], mx.float32)
        loss, count, wins = np.array(self.world.sum(figures), np.float64).tolist()
        accuracy = wins / count if self.objective.compares else None
        return Validation(loss / count, round(count), accuracy)

    def _ran_out_of_patience(self) -> bool:
        patience = self.recipe.patience
        return patience is not None and self.progress.evals_since_best >= patience

    # What is kept --------------------------------------------------------------

    def save(self, *, last: bool = False) -> bool:
        """Save everything; return whether the disk took it.

        Raises:
            OpenELMError: the weights are not finite, or, the last time, the disk
                refuses.
        """
        trained, progress = trained_tensors(self.model), self.progress
        if not all(mx.isfinite(array).all().item() for array in trained.values()):
            raise OpenELMError(
                f"After step {progress.step} the adapter holds NaN or infinity, and "
                "is not saved; lower --learning-rate; "
                f"{self._describe_kept()}"
            )
        if self.world.rank > 0:
            return True
        window = self._window
        progress.window_loss, progress.window_tokens = window.loss, window.count
        progress.window_wins, progress.window_margin = window.wins, window.margin
        optimizer = flatten(self.optimizer.state)
        try:
            save_state(self.folder, State(progress, trained, optimizer, self._run))
            if progress.step:
                self._save_adapter(last=last)
        except OSError as error:
            if last:
                with contextlib.suppress(OSError):  # it is smaller than the state
                    self._save_adapter(last=True)
                raise OpenELMError(
                    f"The end of the run could not be saved ({error}); make room, and "
                    f"go on with --resume: {self._describe_kept()}"
                ) from error
            text = (
                f"Step {progress.step} could not be saved ({error}); the run goes on, "
                f"and {self._describe_kept()}"
            )
            self.note(text)
            return False
        self._saved_step = progress.step
        if progress.step:
            self.emit({"event": "save", "step": progress.step})
        return True

    def _save_adapter(self, *, last: bool = False) -> None:
        recipe, step = self.recipe, self.progress.step
        tensors = adapter_tensors(self.model)
        replace_weights(self.folder, tensors)
        due = step % recipe.save_every == 0 or last
        if recipe.average_last > 1 and due:
            keep(self.folder, step, tensors, most=recipe.average_last)

    @contextlib.contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """A full disk costs what is beside the run, not the run."""
        try:
            yield
        except OSError as error:
            self.note(f"{self.folder / name} could not be written: {error}.")

    def _leave(self, number: int) -> None:
        kept = self._saved_step == self.progress.step or self.save()
        step = self.progress.step
        self.emit({"event": "end", "step": step, "reason": "interrupted"})
        leaving: BaseException = (
            KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        )
        said = f"Saved at step {step}." if kept else self._describe_kept().capitalize()
        leaving.add_note(f"{said} {describe_resume(self.folder)}")
        raise leaving

    def _refuse_unchanged(self) -> None:
        if digest_arrays(trained_tensors(self.model)) == self._initial_digest:
            raise OpenELMError(
                f"After {self.progress.step} steps the adapter is what it was at the "
                "start: nothing was learnt. Look at --learning-rate and the data; "
                f"{self.progress.skipped} batches were skipped."
            )
