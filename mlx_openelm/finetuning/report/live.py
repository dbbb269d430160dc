"""report.html of a run: written at its start, at validations, and at its end."""

import dataclasses
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.preparation import Prepared
from mlx_openelm.finetuning.report.content import TrainingRun, describe_run
from mlx_openelm.finetuning.run_context import RunContext
from mlx_openelm.finetuning.run_files import PAGE, RECIPE, write_text
from mlx_openelm.finetuning.run_folder import stem
from mlx_openelm.reporting.run_history import Pace, read_number
from mlx_openelm.reporting.training_report import render_training_report
from mlx_openelm.storage.adapter_folder import BEST, WEIGHTS
from mlx_openelm.training.events import Event, read_events

MAX_SHARE = 0.01  # of the run's time, for writing the page during the run
EXPECTED_SECONDS = 0.5  # of the first page with charts
NEW_CONTENT = ("eval", "sample", "save", "skip")


class LiveReport:
    """Follows the events of a run, and rewrites its page at intervals.

    A context manager: the page is complete when the block is left, also by an
    exception. A page that cannot be written is noted, and the run continues.
    """

    def __init__(self, prepared: Prepared, run: RunContext) -> None:
        self._prepared, self._run = prepared, run
        self._pace = Pace(MAX_SHARE, EXPECTED_SECONDS)
        self._outdated = False

    def __enter__(self) -> Self:
        self._write(running=True)
        return self

    def __call__(self, event: Event) -> None:
        """Rewrite the page at the first report after a validation, if time allows."""
        if event.get("event") in NEW_CONTENT:
            self._outdated = True
        elif event.get("event") == "step" and self._outdated and self._pace.allows():
            self._outdated = False
            with self._pace:
                self._write(running=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        failure = None
        if isinstance(error, Exception):
            failure = str(error) if isinstance(error, OpenELMError) else repr(error)
        self._write(running=False, failure=failure)

    def _write(self, *, running: bool, failure: str | None = None) -> None:
        try:
            run = describe_training(
                self._prepared, self._run, running=running, failure=failure
            )
            page = render_training_report(describe_run(run))
            write_text(self._run.folder / PAGE, page)
        except Exception as error:  # any error: the report must not stop the run
            self._run.log.note(f"The report could not be written: {error}.")


def describe_training(
    prepared: Prepared, run: RunContext, *, running: bool, failure: str | None
) -> TrainingRun:
    """Return a run as its folder, its plan and its progress describe it now."""
    events = read_events(run.folder)
    now = time.strftime("%H:%M:%S")
    progress = (
        f"Training: {run.progress.step:,} of {prepared.plan.steps:,} steps at {now}."
    )
    return TrainingRun(
        name=stem(Path(run.recipe.data)),
        model=run.recipe.model,
        facts=dict(_list_facts(prepared, run, events)),
        events=events,
        data=dataclasses.asdict(prepared.table),
        recipe=run.recipe.to_yaml(),
        commands=list(_list_commands(run.folder, prepared.example or "...")),
        likelihood=run.objective.likelihood,
        progress=progress if running else None,
        failure=failure,
    )


def _list_commands(path: Path, prompt: str) -> Iterator[tuple[str, str]]:
    """Yield what can be done with the run, as description and command line."""
    trained = [p for p in (path / BEST, path) if (p / WEIGHTS).is_file()]
    if trained:
        adapter, fused = shlex.quote(str(trained[0])), shlex.quote(f"{path}-fused")
        generate = (
            f"mlx-openelm generate --adapter-path {adapter} -p {shlex.quote(prompt)}"
        )
        fuse = f"mlx-openelm fuse --adapter-path {adapter} --save-path {fused}"
        yield "Generate with it", generate
        yield "Make it part of the model", fuse
    recipe = shlex.quote(str(path / RECIPE))
    yield "Repeat the run", f"mlx-openelm lora -c {recipe} --force"


def _list_facts(
    prepared: Prepared, run: RunContext, events: Sequence[Event]
) -> Iterator[tuple[str, str]]:
    recipe, plan, progress = run.recipe, prepared.plan, run.progress
    unit, epochs = run.objective.unit, run.order.epoch_after(progress.step)
    method = [recipe.fine_tune_type.replace("lora", "LoRA").replace("dora", "DoRA")]
    if recipe.fine_tune_type != "full":
        method += [f"rank {recipe.rank}", f"scale {recipe.scale:g}"]
    if run.objective.label:
        method.append(run.objective.label)
    yield "method", ", ".join(method)
    share = plan.trainable / plan.parameters
    yield (
        "trainable",
        f"{plan.trainable:,} of {plan.parameters:,} weights ({share:.2%})",
    )
    yield "steps", f"{progress.step:,} of {plan.steps:,} ({epochs:.2f} epochs)"
    yield f"trained {unit}s", f"{progress.tokens:,}"
    rate = progress.tokens / max(progress.seconds, 1e-9)
    yield "time", f"{progress.seconds:,.0f} s, {rate:,.0f} {unit}s/s"
    peak, planned = progress.peak_memory / 1e9, plan.memory.total / 1e9
    yield "peak memory", f"{peak:.2f} GB, planned {planned:.2f} GB"
    for event in events:
        loss = read_number(event, "loss")
        if event.get("event") == "test" and loss is not None:
            yield "test loss", f"{loss:.4f} nats per {unit}"
