"""The result of a fine-tuning run."""

import math
from dataclasses import dataclass
from pathlib import Path

from mlx_openelm.finetuning.preparation import Prepared
from mlx_openelm.finetuning.run_context import RunContext
from mlx_openelm.finetuning.validation import Validator
from mlx_openelm.training.events import read_events


@dataclass(frozen=True, slots=True)
class FinetuneReport:
    """The figures of a finished run. Losses are means per `unit`, in nats.

    Attributes:
        reason: why training ended: "done" or "patience".
        unit: "token", or "pair" for preferences; `tokens` counts these units.
        first_loss, last_loss, best_loss: validation losses; None without validation.
        tokens: number of trained target tokens, or pairs.
        seconds: training time, without validation.
    """

    path: Path
    reason: str
    unit: str
    steps: int
    epochs: float
    trainable: int
    parameters: int
    first_loss: float | None
    last_loss: float | None
    best_loss: float | None
    best_step: int | None
    test_loss: float | None
    tokens: int
    skipped: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int


def finish_run(
    prepared: Prepared, run: RunContext, validator: Validator, reason: str
) -> FinetuneReport:
    """Compute the test loss, and return the result.

    Args:
        reason: why training ended: "done" or "patience".
    """
    progress, plan, test_loss = run.progress, prepared.plan, None
    if run.recipe.test:
        test_loss = validator.evaluate(prepared.test).loss
        run.log.emit("test", loss=test_loss)
    evals = [event for event in read_events(run.folder) if event["event"] == "eval"]
    losses = [event.get("loss") for event in evals]
    validated = math.isfinite(progress.best_loss)
    return FinetuneReport(
        path=run.folder,
        reason=reason,
        unit=run.objective.unit,
        steps=progress.step,
        epochs=round(run.order.epoch_after(progress.step), 4),
        trainable=plan.trainable,
        parameters=plan.parameters,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        best_loss=progress.best_loss if validated else None,
        best_step=progress.best_step if validated else None,
        test_loss=test_loss,
        tokens=progress.tokens,
        skipped=progress.skipped,
        seconds=round(progress.seconds, 3),
        tokens_per_second=round(progress.tokens / max(progress.seconds, 1e-9), 2),
        peak_memory_bytes=progress.peak_memory,
    )
