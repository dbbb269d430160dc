"""Learned quantization: scales and biases trained to match the unquantized model.

The packed integers stay as rounding chose them; the loss is the KL divergence of the
next-token distributions (knowledge distillation, Hinton et al., 1503.02531). Only a
folder that measures better on held-out text than plain rounding is kept.

The state is saved in a folder, from which a stopped run resumes with the same result:

    state.safetensors   trained weights, optimizer and progress
    best.safetensors    the weights with the least divergence so far
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from converters.quantization.calibration import LearningWindows
from converters.quantization.learning_amount import LearningAmount
from converters.quantization.teachers import Teacher
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.head_divergence import (
    Head,
    Outputs,
    compare,
    head_of,
    hidden_rows,
    total_divergence,
)
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.signals import Stop, deferred_signals
from mlx_openelm.storage.adapter_folder import save_tensors
from mlx_openelm.storage.staging import replaced_file
from mlx_openelm.training.arrays import to_float, trained_tensors
from mlx_openelm.training.distributed import World
from mlx_openelm.training.non_finite import MAX_SKIPPED_IN_A_ROW
from mlx_openelm.training.objective import Totals
from mlx_openelm.training.optimizer import make_optimizer
from mlx_openelm.training.state import STATE, TrainingState, load_state
from mlx_openelm.training.step import Part, Step, StepResult

BATCH = 2  # windows
RATE, BETAS, EPS = 0.0175, (0.9, 0.95), 1e-8  # peak learning rate, in steps; Adam
WARMUP = 3  # steps; their time is what minutes are converted to steps by
SAVE_SECONDS = 30.0  # between two saves
STEPS_PER_EVALUATION = 10  # at least
EVALUATIONS = 10  # about, in a long run
_BEST = "best.safetensors"

OnStep = Callable[[int, int, float], None]  # steps done, all steps, KL of a token


@dataclass(frozen=True, slots=True)
class LearningRecord:
    """What learning did, measured on text that was not learned from.

    Attributes:
        text: name of the text.
        steps: number of updates.
        best_step: the step whose scales are kept; 0: those of plain rounding.
        learned_tokens: tokens learned from, counted each time.
        tokens: number of tokens of the measurement.
        mean_kl_before, mean_kl_after: KL(original || quantized), nats per token, with
            plain rounding and with the scales that are kept.
        top1_before, top1_after: fraction of positions with the same most likely token.
        skipped: windows of batches that were skipped, as loss or gradient was not
            finite; their numbers in the part of the text that is learned from.
    """

    text: str
    steps: int
    best_step: int
    learned_tokens: int
    tokens: int
    mean_kl_before: float
    mean_kl_after: float
    top1_before: float
    top1_after: float
    skipped: tuple[int, ...] = ()


class ScaleLearner:
    """Trains the scales of a student to match a teacher.

    Args:
        student: a model with the layers of `learned_scales`; they are all trained.
        teacher: the unquantized model, or a more exact one.
        windows: the text.
        folder: where the state is saved; if it holds one, learning resumes from it.
        seed: determines the order of the windows.
        on_step: receives the progress.
    """

    def __init__(
        self,
        student: OpenELM,
        teacher: Teacher,
        windows: LearningWindows,
        folder: Path,
        *,
        seed: int = 0,
        on_step: OnStep = lambda done, total, kl: None,
    ) -> None:
        student.freeze()
        student.unfreeze(keys=["a", "c"])
        self._student, self._teacher = student, teacher
        self._learn_from = windows.learn
        teacher.prepare(mx.concatenate([windows.choose, windows.report]))
        self._choose_by, self._report_on = (
            Reference.of(teacher, part) for part in (windows.choose, windows.report)
        )
        self._folder, self._seed, self._on_step = folder, seed, on_step
        self._evaluation_seconds = 0.0
        optimizer = make_optimizer(student, "adam", BETAS, EPS, 0.0)
        self._state = TrainingState(student, optimizer)
        self._step = Step(
            student, _Divergence(teacher), optimizer, World(0, 1), clip_norm=None
        )
        self._steps: int | None = None
        self._saved_at = time.monotonic()
        self._skipped: list[int] = []
        self._text = ""

    def learn(self, amount: LearningAmount, text: str) -> LearningRecord:
        """Train; the student has the best scales then, unless `best_step` is 0.

        Args:
            text: name of the text, for the record.

        Raises:
            OpenELMError: the divergence is not finite.
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM; the state is saved.
        """
        progress = self._state.progress
        self._text = text
        before = measure(self._student, self._report_on)
        _refuse_non_finite(before.kl, text)
        self._steps = amount.steps
        if (self._folder / STATE).is_file():
            self._restore()
            progress = self._state.progress
        complete = False
        while not complete:
            self._teacher.prepare(self._learn_from[self._windows_ahead()])
            self._folder.mkdir(exist_ok=True)  # from here on, signals save a state
            with deferred_signals() as stop:
                complete = self._train(amount, stop)
        self._load(self._folder / _BEST)
        after = measure(self._student, self._report_on)
        best_step = progress.best_step
        if not after.kl <= before.kl:
            best_step, after = 0, before
        return LearningRecord(
            text=text,
            steps=progress.step,
            best_step=best_step,
            learned_tokens=progress.tokens,
            tokens=self._report_on.num_tokens,
            mean_kl_before=before.kl,
            mean_kl_after=after.kl,
            top1_before=before.top1,
            top1_after=after.top1,
            skipped=tuple(self._skipped),
        )

    def _windows_ahead(self) -> mx.array:
        """Return the windows of all steps left whose number is known, each once."""
        windows = dict[int, None]()  # ordered
        for step in range(self._state.progress.step, self._steps or WARMUP):
            windows |= dict.fromkeys(self._choose(step))
            if len(windows) == self._learn_from.shape[0]:
                break
        return mx.array(list(windows), mx.int32)

    def _train(self, amount: LearningAmount, stop: Stop) -> bool:
        """Train up to the last step, or to that which determines their number.

        Return whether it was the last.
        """
        progress = self._state.progress
        while True:
            last = progress.step == self._steps
            if last or progress.step % self._steps_per_evaluation == 0:
                self._evaluate()
            if last:
                self._save()
                return True
            if stop.number is not None:
                self._interrupt(stop.number)
            self._update()
            if self._steps is None and progress.step == WARMUP:
                self._steps = self._plan_steps(amount)
                self._save()
                return False
            if time.monotonic() - self._saved_at > SAVE_SECONDS:
                self._save()

    @property
    def _steps_per_evaluation(self) -> int:
        return max(STEPS_PER_EVALUATION, (self._steps or 0) // EVALUATIONS)

    def _plan_steps(self, amount: LearningAmount) -> int:
        """Return the number of steps that fit into the minutes."""
        progress = self._state.progress
        a_step = progress.seconds / progress.step
        a_step += self._evaluation_seconds / STEPS_PER_EVALUATION
        return max(WARMUP, int(60 * (amount.minutes or 0.0) / a_step))

    def _update(self) -> None:
        progress, started = self._state.progress, time.perf_counter()
        indices = self._choose(progress.step)
        batch = [self._learn_from[i] for i in indices]
        result = self._step.update(
            [Part(0, tuple(indices), batch)], learning_rate=self._rate_at(progress.step)
        )
        progress.step += 1
        if result.applied:
            progress.add_update(result.totals)
        else:
            self._skip(indices, result)
        progress.seconds += time.perf_counter() - started
        kl = result.totals.loss / max(1, result.totals.count)
        self._on_step(progress.step, self._steps or progress.step + 1, kl)

    def _skip(self, indices: Sequence[int], result: StepResult) -> None:
        progress = self._state.progress
        progress.add_skipped()
        self._skipped += result.non_finite or indices
        if progress.skipped_in_row == MAX_SKIPPED_IN_A_ROW:
            numbers = ", ".join(str(i + 1) for i in self._skipped[-4:])
            raise OpenELMError(
                f"Loss or gradient was not finite in {MAX_SKIPPED_IN_A_ROW} batches in "
                f"a row, up to step {progress.step} (windows {numbers} of the text); "
                "check the weights with `verify`, or leave out `learn`."
            )

    def _rate_at(self, step: int) -> float:
        """Return the learning rate: WARMUP steps up, then a cosine to zero."""
        if step < WARMUP or self._steps is None:
            return RATE * (step + 1) / (WARMUP + 1)
        done = (step - WARMUP) / max(1, self._steps - WARMUP)
        return RATE * (1 + math.cos(math.pi * done)) / 2

    def _choose(self, step: int) -> list[int]:
        """Return the windows of a step; each epoch has its own order of them."""
        count = self._learn_from.shape[0]
        chosen = []
        for place in range(step * BATCH, (step + 1) * BATCH):
            epoch, index = divmod(place, count)
            chosen.append(int(_shuffle(count, self._seed, epoch)[index]))
        return chosen

    def _evaluate(self) -> None:
        """Keep the weights if they are the best so far."""
        progress = self._state.progress
        if progress.evaluated_step == progress.step:
            return
        progress.evaluated_step, started = progress.step, time.perf_counter()
        kl = measure(self._student, self._choose_by).kl
        if progress.best_loss == math.inf:  # the first evaluation
            _refuse_non_finite(kl, self._text)
        self._evaluation_seconds = time.perf_counter() - started
        if kl < progress.best_loss:  # false for NaN
            progress.best_loss, progress.best_step = kl, progress.step
            with replaced_file(self._folder / _BEST) as path:
                save_tensors(path, trained_tensors(self._student), format="mlx")

    # The state -----------------------------------------------------------------------

    def _save(self) -> None:
        run = {"steps": self._steps, "skipped": self._skipped}
        self._state.save(self._folder, run)
        self._saved_at = time.monotonic()

    def _restore(self) -> None:
        saved = load_state(self._folder)
        self._state.restore(self._folder, World(0, 1))
        self._steps, self._skipped = saved.run["steps"], list(saved.run["skipped"])

    def _interrupt(self, number: int) -> NoReturn:
        self._save()
        raise KeyboardInterrupt if number == 2 else SystemExit(128 + number)

    def _load(self, path: Path) -> None:
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        self._student.update(tree_unflatten(list(arrays.items())))


@functools.lru_cache(maxsize=2)
def _shuffle(count: int, seed: int, epoch: int) -> "np.ndarray[Any, Any]":
    """Return the order of the windows in an epoch."""
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    return np.argsort(raw.random_raw(count), kind="stable")


class _Divergence:
    """The objective: KL(teacher || student) at each position of the windows."""

    unit, pairwise = "token", False

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def collate(self, samples: Sequence[mx.array]) -> mx.array:
        """Return the input tokens (N, T) of windows (1 + T,)."""
        return mx.stack(list(samples))[:, :-1]

    def loss(self, model: OpenELM, batch: mx.array) -> tuple[mx.array, mx.array]:
        taught = Outputs(self._teacher.rows(batch), self._teacher.head)
        student = Outputs(hidden_rows(model, batch), head_of(model))
        return total_divergence(student, taught), mx.zeros(0)

    def totals(self, batch: mx.array, loss: mx.array, margins: mx.array) -> Totals:
        return Totals(to_float(loss), batch.size)

    def evaluate(self, model: OpenELM, batch: Any) -> Totals:
        loss, margins = self.loss(model, batch)
        return self.totals(batch, loss, margins)


def _refuse_non_finite(kl: float, text: str) -> None:
    if not math.isfinite(kl):
        raise OpenELMError(
            f"The loss on {text} is not finite, so the weights are damaged or "
            "activations overflow; download the checkpoint again."
        )


@dataclass(frozen=True, slots=True)
class Divergence:
    """Mean KL(teacher || student) of a token, and the share of equal top tokens."""

    kl: float
    top1: float


@dataclass(frozen=True, slots=True)
class Reference:
    """The teacher's final hidden states on windows; their logits are never stored.

    Attributes:
        windows: token ids (N, 1 + T).
        rows: normalised hidden states (T, D) of each window.
        head: the teacher's output head.
    """

    windows: mx.array
    rows: tuple[mx.array, ...]
    head: Head

    @classmethod
    def of(cls, teacher: Teacher, windows: mx.array) -> "Reference":
        rows = []
        for window in windows:
            rows.append(teacher.rows(window[None, :-1]))
            mx.eval(rows[-1])
        return cls(windows, tuple(rows), teacher.head)

    @property
    def num_tokens(self) -> int:
        return self.windows[:, 1:].size


def measure(student: OpenELM, reference: Reference) -> Divergence:
    """Compare a model with the teacher, window by window."""
    sums = np.zeros(2)
    for window, taught in zip(reference.windows, reference.rows, strict=True):
        rows = hidden_rows(student, window[None, :-1])
        found = compare(
            Outputs(rows, head_of(student)), Outputs(taught, reference.head)
        )
        sums += [to_float(found.divergence.sum()), to_float(found.agrees.sum())]
    kl, top1 = (sums / reference.num_tokens).tolist()
    return Divergence(kl, top1)
