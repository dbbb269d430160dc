"""The result of a fine-tuning run: its figures, and its page."""

import dataclasses
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from mlx_openelm.finetuning.preparation import Prepared, stem
from mlx_openelm.finetuning.report import TrainingRun, render_page
from mlx_openelm.finetuning.run_context import RunContext
from mlx_openelm.finetuning.run_files import PAGE, RECIPE, write_text
from mlx_openelm.finetuning.validation import Validator
from mlx_openelm.storage.adapter_folder import BEST, WEIGHTS
from mlx_openelm.training.events import read_events


@dataclass(frozen=True, slots=True)
class FinetuneReport:
    """A run that came to its end. Losses are nats per token that counts, or per pair.

    Attributes:
        unit: what losses are of, and `tokens` counts: "token", of preferences "pair".
        reason: why it ended: "done" or "patience".
        first_loss, last_loss, best_loss: of the validation; None where there was none.
        tokens: trained.
        seconds: of training, without validation.
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
    """Score the test set, draw the page, and sum the run up.

    Args:
        reason: why training ended.
    """
    progress, plan, test_loss = run.progress, prepared.plan, None
    if run.recipe.test:
        test_loss = validator.evaluate(prepared.test).loss
        run.log.emit("test", loss=test_loss)
    evals = [event for event in read_events(run.folder) if event["event"] == "eval"]
    losses = [event.get("loss") for event in evals]
    validated = math.isfinite(progress.best_loss)
    report = FinetuneReport(
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
    if run.world.rank == 0:
        try:
            write_text(run.folder / PAGE, _draw(prepared, report))
        except OSError as error:
            run.log.note(f"The report could not be written: {error}.")
    return report


def _draw(prepared: Prepared, report: FinetuneReport) -> str:
    recipe, plan, path = prepared.recipe, prepared.plan, prepared.path
    method = [recipe.fine_tune_type.replace("lora", "LoRA").replace("dora", "DoRA")]
    if recipe.fine_tune_type != "full":
        method += [f"rank {recipe.rank}", f"scale {recipe.scale:g}"]
    if prepared.objective.label:
        method.append(prepared.objective.label)
    facts = {
        "method": ", ".join(method),
        "trainable": f"{plan.trainable:,} of {plan.parameters:,} weights "
        f"({plan.trainable / plan.parameters:.2%})",
        "steps": f"{report.steps:,} of {plan.steps:,} ({report.epochs:.2f} epochs)",
        f"trained {report.unit}s": f"{report.tokens:,}",
        "time": f"{report.seconds:,.0f} s, {report.tokens_per_second:,.0f} "
        f"{report.unit}s/s",
        "peak memory": f"{report.peak_memory_bytes / 1e9:.2f} GB, planned "
        f"{plan.memory.total / 1e9:.2f} GB",
        "ended": "out of patience" if report.reason == "patience" else "as planned",
    }
    if report.test_loss is not None:
        facts["test loss"] = f"{report.test_loss:.4f} nats per {report.unit}"
    best = path / BEST
    use = shlex.quote(str(best if (best / WEIGHTS).is_file() else path))
    fused = shlex.quote(f"{path}-fused")
    again = shlex.quote(str(path / RECIPE))
    return render_page(
        TrainingRun(
            name=stem(Path(recipe.data)),
            model=recipe.model,
            facts=facts,
            events=read_events(path),
            data=dataclasses.asdict(prepared.table),
            recipe=recipe.to_yaml(),
            likelihood=prepared.objective.likelihood,
            commands=[
                ("Write with it", f'mlx-openelm generate --adapter-path {use} "..."'),
                (
                    "Make it part of the model",
                    f"mlx-openelm fuse --adapter-path {use} --save-path {fused}",
                ),
                ("Run the same again", f"mlx-openelm lora -c {again} --force"),
            ],
        )
    )
