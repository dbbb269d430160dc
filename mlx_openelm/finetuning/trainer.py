"""The training loop: one for LoRA, DoRA and full, for texts and preferences.

A step takes its samples from the order of the run, makes gradients share by share, sums
them over shares and machines, divides by the tokens that counted, clips, and updates.
What it must not lose stands in `Progress`, and is saved with weights and optimizer.
"""

import contextlib
import hashlib
import json
import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.adapter_snapshots import (
    AVERAGE,
    keep,
    replace_copy,
    replace_weights,
    write_average,
)
from mlx_openelm.finetuning.batches import Batch, collate, collate_pairs, share_out
from mlx_openelm.finetuning.distributed import World
from mlx_openelm.finetuning.losses import (
    batch_losses,
    preference_losses,
    preference_margins,
    sequence_likelihoods,
    total_norm,
)
from mlx_openelm.finetuning.optimizer import make_optimizer
from mlx_openelm.finetuning.plan import Order
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.samples import Pair, Sample
from mlx_openelm.finetuning.state import (
    Progress,
    State,
    append_event,
    load_state,
    save_state,
)
from mlx_openelm.finetuning.trainable import (
    adapter_tensors,
    trained_tensors,
    use_dropout,
)
from mlx_openelm.generation.sampling import Sampling
from mlx_openelm.generation.streaming import generate
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.signals import Stop, deferred_signals
from mlx_openelm.storage.adapter_folder import BEST
from mlx_openelm.text.tokenizer import Tokenizer

MOST_IN_A_ROW = 3  # batches that are not finite

Event = Mapping[str, Any]
Samples = Sequence[Sample] | Sequence[Pair]


@dataclass(frozen=True, slots=True)
class Validation:
    """Mean loss in nats per token that counts (of preferences: per pair)."""

    loss: float
    tokens: int
    accuracy: float | None = None


@dataclass(slots=True)
class _Sums:
    """What a step or a validation adds up, over shares and machines."""

    loss: float = 0.0
    count: int = 0
    wins: float = 0.0
    margin: float = 0.0

    def add(self, other: "_Sums") -> None:
        self.loss += other.loss
        self.count += other.count
        self.wins += other.wins
        self.margin += other.margin


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
        self.optimizer = make_optimizer(model, recipe)
        self._run, self._sampling, self._on_event = run, sampling, on_event
        self._train, self._valid = train, valid
        self._lengths = lengths_of(train)
        self._gradient = nn.value_and_grad(model, self._lose)
        self._window = _Sums()
        self._last: dict[str, float] = {}
        self._saved_step = -1
        self._begun = _digest(trained_tensors(self.model))
        # What the model thinks of each answer before training is the policy's anchor.
        self._references: dict[str, tuple[float, float]] = {}
        if recipe.objective == "dpo":
            self._refer([*train, *valid, *test])

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
        self._window = _Sums(
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
                stopped.add_note(f"{kept} {self._describe_way_on()}")
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
                with self._out_of_memory_in_one_sentence():
                    stopping = self._update(stop)
                done = progress.step == steps
                if progress.step % recipe.steps_per_report == 0 or done:
                    self._report()
            else:
                stopping = True

    @contextlib.contextmanager
    def _out_of_memory_in_one_sentence(self) -> Iterator[None]:
        """Where MLX raises, that is; most back ends end the process."""
        try:
            yield
        except RuntimeError as error:
            if "alloc" not in str(error) and "emory" not in str(error):
                raise
            raise OpenELMError(
                f"The memory ran out in step {self.progress.step + 1}; "
                f"{self._describe_kept()} {advise_half_a_batch(self.recipe)}"
            ) from error

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
        progress, recipe, world = self.progress, self.recipe, self.world
        started = time.perf_counter()
        indices = self.order.batch(progress.step)
        parts = recipe.grad_accumulation_steps
        shares = share_out(indices, self._lengths, parts * world.size)
        sums, gradients, bad = _Sums(), None, list[int]()
        for part in range(world.rank * parts, (world.rank + 1) * parts):
            share = shares[part]
            if not share:
                continue
            use_dropout(self.model, recipe.seed, progress.step, part)
            found, gradient = self._differentiate(share)
            sums.add(found)
            if not math.isfinite(found.loss):
                bad += share
            gradients = (
                gradient if gradients is None else tree_map(mx.add, gradients, gradient)
            )
            mx.eval(gradients)
        use_dropout(self.model)
        if gradients is None:  # fewer samples than processes
            gradients = tree_map(mx.zeros_like, self.model.trainable_parameters())
        if world.size > 1:
            # A mean over processes, in few messages; what is wanted is the sum.
            gradients = nn.average_gradients(gradients)
            gradients = tree_map(lambda g: g * world.size, gradients)
        asked = stop.number is not None
        figures = [sums.loss, sums.count, sums.wins, sums.margin, asked]
        heard = np.array(world.sum(mx.array(figures, mx.float32)), np.float64).tolist()
        sums = _Sums(heard[0], round(heard[1]), heard[2], heard[3])
        length = total_norm(list(flatten(gradients).values()))
        norm = _number(length) / max(1, sums.count)
        rate = recipe.rate_at(progress.step, self.order.steps)
        progress.step += 1
        if math.isfinite(sums.loss) and math.isfinite(norm):
            clipped = (
                min(1.0, recipe.clip_norm / (norm + 1e-6)) if recipe.clip_norm else 1.0
            )
            factor = clipped / sums.count
            self.optimizer.learning_rate = rate
            self.optimizer.update(
                self.model, tree_map(lambda gradient: gradient * factor, gradients)
            )
            mx.eval(self.model.trainable_parameters(), self.optimizer.state)
            progress.skipped_in_row = 0
            progress.tokens += sums.count
            self._window.add(sums)
        else:
            self._skip(bad or list(indices), sums.loss, norm)
        self._last = {"learning_rate": rate, "grad_norm": norm}
        progress.seconds += time.perf_counter() - started
        progress.peak_memory = max(progress.peak_memory, mx.get_peak_memory())
        return bool(heard[4] > 0)

    def _differentiate(self, share: Sequence[int]) -> tuple[_Sums, Any]:
        chosen: Samples = [self._train[i] for i in share]  # type: ignore[assignment]
        batch, count, reference = self._collate(chosen)
        (loss, margins), gradients = self._gradient(batch, reference)
        mx.eval(loss, margins, gradients)
        sums = _Sums(_number(loss), count)
        if self.recipe.objective == "dpo":
            sums.wins = _number((margins > 0).sum())
            sums.margin = _number(margins.sum())
        return sums, gradients

    def _lose(self, batch: Batch, reference: mx.array) -> tuple[mx.array, mx.array]:
        """Return the sum of the losses, and the margins of pairs."""
        if self.recipe.objective == "dpo":
            likelihoods = sequence_likelihoods(self.model, batch)
            margins = preference_margins(
                likelihoods, reference, beta=self.recipe.dpo_beta
            )
            return preference_losses(margins, self.recipe.dpo_loss).sum(), margins
        losses = batch_losses(self.model, batch, z_loss=self.recipe.z_loss)
        return losses.sum(), reference

    def _collate(self, samples: Samples) -> tuple[Batch, int, mx.array]:
        """Return a batch, what its loss is divided by, and the reference's view."""
        if self.recipe.objective == "dpo":
            batch = collate_pairs(samples)  # type: ignore[arg-type]
            return batch, len(samples), self._reference(samples)
        batch = collate(samples)  # type: ignore[arg-type]
        return batch, len(batch.positions), mx.zeros(0)

    def _skip(self, indices: Sequence[int], loss: float, norm: float) -> None:
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_row += 1
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
        if progress.skipped_in_row == MOST_IN_A_ROW:
            raise OpenELMError(
                f"Loss or gradient was not finite in {MOST_IN_A_ROW} batches in a "
                f"row, up to step {progress.step} ({', '.join(places[:4])}); nothing "
                "of them was learnt. Lower --learning-rate, or look at these records; "
                f"{self._describe_kept()}"
            )

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
        pairs = self.recipe.objective == "dpo"
        self.emit(
            {
                "event": "step",
                "step": progress.step,
                "epoch": round(self.order.epoch_after(progress.step), 4),
                "loss": window.loss / count if window.count else math.nan,
                **self._last,
                **(
                    {"accuracy": window.wins / count, "margin": window.margin / count}
                    if pairs
                    else {}
                ),
                "tokens": progress.tokens,
                "tokens_per_second": round(window.count / seconds, 2),
                "memory_bytes": mx.get_active_memory() + mx.get_cache_memory(),
                "peak_memory_bytes": progress.peak_memory,
                "seconds": round(progress.seconds, 3),
            }
        )
        self._window = _Sums()

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
        sums, size = _Sums(), self.recipe.batch_size
        starts = range(0, len(samples), size)
        for start in starts[self.world.rank :: self.world.size]:
            found = samples[start : start + size]
            batch, count, reference = self._collate(found)
            if self.recipe.objective == "dpo":
                likelihoods = sequence_likelihoods(self.model, batch, gradient=False)
                margins = preference_margins(
                    likelihoods, reference, beta=self.recipe.dpo_beta
                )
                loss = preference_losses(margins, self.recipe.dpo_loss).sum()
                sums.wins += _number((margins > 0).sum())
            else:
                loss = batch_losses(self.model, batch, gradient=False).sum()
            sums.loss += _number(loss)
            sums.count += count
        figures = mx.array([sums.loss, sums.count, sums.wins], mx.float32)
        loss_sum, count_sum, wins = np.array(
            self.world.sum(figures), np.float64
        ).tolist()
        accuracy = wins / count_sum if self.recipe.objective == "dpo" else None
        return Validation(loss_sum / count_sum, round(count_sum), accuracy)

    def _ran_out_of_patience(self) -> bool:
        patience = self.recipe.patience
        return patience is not None and self.progress.evals_since_best >= patience

    # Preferences ---------------------------------------------------------------

    def _refer(self, pairs: Sequence[Pair]) -> None:
        """Compute what the model before training thinks of all answers."""
        size = self.recipe.batch_size
        for start in range(0, len(pairs), size):
            chosen = pairs[start : start + size]
            batch = collate_pairs(chosen)
            both = sequence_likelihoods(self.model, batch, gradient=False)
            found = np.array(both, np.float64).reshape(2, len(chosen)).T.tolist()
            for pair, (better, worse) in zip(chosen, found, strict=True):
                self._references[pair.place] = (better, worse)

    def _reference(self, pairs: Samples) -> mx.array:
        """Return the reference's log-likelihoods (2 P,), the better answers first."""
        found = [self._references[pair.place] for pair in pairs]
        return mx.array(found).T.reshape(-1)

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
        leaving.add_note(f"{said} {self._describe_way_on()}")
        raise leaving

    def _describe_way_on(self) -> str:
        path = shlex.quote(str(self.folder))
        return f"Go on with: mlx-openelm lora --resume --adapter-path {path}"

    def _refuse_unchanged(self) -> None:
        if _digest(trained_tensors(self.model)) == self._begun:
            raise OpenELMError(
                f"After {self.progress.step} steps the adapter is what it was at the "
                "start: nothing was learnt. Look at --learning-rate and the data; "
                f"{self.progress.skipped} batches were skipped."
            )


def advise_half_a_batch(recipe: FinetuneRecipe) -> str:
    """Return a sentence on what to say where the memory ran out."""
    if recipe.dropout and not recipe.grad_checkpoint:
        return "--resume --grad-checkpoint needs much less, and goes on the same."
    if recipe.batch_size == 1 or recipe.dropout:
        return "Begin anew with a smaller --max-seq-length or --batch-size."
    return (
        f"Half the batch needs half the memory: --resume --batch-size "
        f"{recipe.batch_size // 2} --grad-accumulation-steps "
        f"{recipe.grad_accumulation_steps * 2} goes on with the same steps."
    )


def lengths_of(samples: Samples) -> list[int]:
    """Return the tokens of each sample; of a pair, of both its sequences."""
    return [
        len(s.tokens)
        if isinstance(s, Sample)
        else len(s.chosen.tokens) + len(s.rejected.tokens)
        for s in samples
    ]


def flatten(tree: Any) -> dict[str, mx.array]:
    """Return the arrays of a tree by their path."""
    return dict(tree_flatten(tree))


def _number(array: mx.array) -> float:
    return float(array.item())  # type: ignore[arg-type] # it is real


def _digest(arrays: Mapping[str, mx.array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.array(arrays[name].astype(mx.float32)).tobytes())
    return digest.hexdigest()
