"""A fine-tuning run on the terminal: plan, progress and result."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.help.examples import PROMPT
from mlx_openelm.cli.views.run import RunView, show_sample
from mlx_openelm.message_parts import count_of

if TYPE_CHECKING:
    from mlx_openelm.finetuning.preparation import Prepared
    from mlx_openelm.finetuning.run import FinetuneReport

MOST_NAMES = 8  # of the samples of a skipped batch

# The plan and the result -----------------------------------------------------------


def plan_json(prepared: "Prepared") -> dict[str, Any]:
    """Return the plan of a run for `--json`."""
    plan = prepared.plan
    return {
        "path": str(prepared.path),
        "plan": {
            **dataclasses.asdict(plan),
            "memory_bytes": plan.memory.total,
            "fits": plan.fits,
        },
        "data": dataclasses.asdict(prepared.table),
        "recipe": dataclasses.asdict(prepared.recipe),
    }


def note_plan(console: Console, prepared: "Prepared") -> None:
    """Write the model, the statistics of the data and the plan to stderr."""
    from mlx_openelm.storage.hub import is_demo

    table, plan, recipe = prepared.table, prepared.plan, prepared.recipe
    if is_demo(prepared.folder.path):
        console.note("model: the built-in demo; --model NAME trains another")
    else:
        console.note(f"model: {recipe.model}")
    for name, split in (
        ("train", table.train),
        ("valid", table.valid),
        ("test", table.test),
    ):
        if split is None:
            continue
        lengths = f"{split.shortest} to {split.longest} tokens (median {split.median})"
        if split.shortest == split.longest:
            lengths = count_of(split.longest, "token")
        console.note(
            f"{name}: {Path(split.file).name} ({split.format}), "
            f"{count_of(split.records, 'record')}, "
            f"{count_of(split.samples, 'sample')} of {lengths}; loss on "
            f"{split.targets:,} of {count_of(split.tokens, 'token')}"
        )
    if len(table.train.lengths) > 1:
        bars = ", ".join(
            f"{count:,} up to {edge}"
            for edge, count in zip(
                table.train.edges[1:], table.train.lengths, strict=True
            )
            if count
        )
        console.note(f"sample lengths: {bars} tokens")
    reason = f" ({table.reason})" if table.reason else ""
    console.note(f"template: {table.template}{reason}")
    for warning in table.warnings:
        console.note(f"note: {warning}")
    memory = plan.memory
    console.note(
        f"{plan.trainable:,} trained parameters "
        f"({plan.trainable / plan.parameters:.2%} of {plan.parameters:,}), "
        f"{count_of(plan.steps, 'step')} of "
        f"{count_of(recipe.step_size, 'row' if recipe.pack else 'sample')} "
        f"({plan.epochs:.2f} epochs), loss on {count_of(plan.targets, 'token')}, "
        "no padding"
    )
    taught = f"teacher {memory.teacher / 1e9:.2f}, " if memory.teacher else ""
    console.note(
        f"memory: about {memory.total / 1e9:.2f} GB of {plan.limit / 1e9:.1f} GB "
        f"(weights {memory.weights / 1e9:.2f}, {taught}adapter and optimizer "
        f"{(memory.adapter + memory.gradients + memory.optimizer) / 1e9:.2f}, "
        f"one batch {(memory.activations + memory.loss) / 1e9:.2f})"
    )
    if not plan.fits or plan.memory.total > plan.limit / 2:
        for flags, total in plan.smaller[:4]:
            console.note(f"  {total / 1e9:.2f} GB with {flags}")


def show_trained(console: Console, report: "FinetuneReport", prompt: str) -> None:
    """Print the adapter's path; write the result and the next command to stderr.

    Args:
        prompt: for the next command, which uses the adapter with the lowest validation
            loss; "": a story's first words.
    """
    from mlx_openelm.storage.adapter_folder import BEST

    adapter, best = report.path, ""
    if report.best_step not in (None, 0, report.steps):
        best = f" (best {report.best_loss:.4f} at step {report.best_step})"
        if (adapter / BEST).is_dir():
            adapter = adapter / BEST
    if report.first_loss is not None and report.last_loss is not None:
        console.note(
            f"validation loss {report.first_loss:.4f} -> {report.last_loss:.4f} nats "
            f"per {report.unit}{best}"
        )
    if report.best_step == 0:
        console.note(
            "The validation loss did not fall; a lower `learning_rate` may help."
        )
    if report.test_loss is not None:
        console.note(f"test loss {report.test_loss:.4f} nats per {report.unit}")
    console.note(
        f"{count_of(report.steps, 'step')}, {count_of(report.tokens, report.unit)} in "
        f"{report.seconds:,.0f} s ({report.tokens_per_second:,.0f} {report.unit}s/s), "
        f"peak memory {report.peak_memory_bytes / 1e9:.2f} GB"
    )
    console.note(f"Report: {report.path / 'report.html'}")
    console.answer(str(report.path))
    prompt = prompt or PROMPT
    dashes = ("--",) if prompt.startswith("-") else ()  # it is not an option
    console.note_next("generate", "--adapter-path", adapter, *dashes, prompt)


# Progress ----------------------------------------------------------------------------


class TrainingView(RunView):
    """Shows the events of a fine-tuning run.

    Events are the rows of metrics.jsonl, and {"event": "note", "text": ...}. "steps" in
    any of them is the length of the run.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.prompt = ""  # of the training data
        self._validation = math.nan  # last validation loss
        self._best = (math.inf, 0)  # best validation loss and its step

    def note_start(self, prepared: "Prepared") -> None:
        """Write the plan of a run that starts, and where its report is, to stderr."""
        note_plan(self._console, prepared)
        self._console.note(f"report during the run: {prepared.path / 'report.html'}")
        self.prompt = prepared.example

    def __call__(self, event: Mapping[str, Any]) -> None:
        self._steps = event.get("steps") or self._steps
        match event.get("event"):
            case "step":
                self._show_step(event)
            case "eval":
                self._note(event["step"], self._describe_eval(event))
            case "sample":
                text = f"{event['prompt']}{event['text']}"
                self._note(event["step"], show_sample(text))
            case "skip":
                self._note(event["step"], _describe_skip(event))
            case "save":
                self._note(event["step"], "saved")
            case "resume":
                self._console.note(f"Resuming after step {event['step']:,}.")
            case "note":
                self._console.note(str(event["text"]))
            case "end":
                self._progress.close()
                if event.get("reason") != "interrupted":  # the program reports that
                    self._console.note(self._describe_end(event))

    def _show_step(self, event: Mapping[str, Any]) -> None:
        figures = [f"loss {_show_loss(event.get('loss'))}"]
        if not math.isnan(self._validation):
            figures.append(f"valid {self._validation:.3f}")
        if event.get("accuracy") is not None:
            figures.append(f"accuracy {event['accuracy']:.0%}")
        figures.append(f"{event.get('tokens_per_second') or 0:,.0f} tokens/s")
        step = event["step"]
        self._progress.update(step, max(step, self._steps), ", ".join(figures))

    def _describe_eval(self, event: Mapping[str, Any]) -> str:
        loss = event.get("loss")
        description = f"validation loss {_show_loss(loss)}"
        if loss is not None and math.isfinite(loss):
            self._validation = loss
            if event.get("best"):
                self._best = (loss, event["step"])
                description += ", the best" if event["step"] else ", before training"
        return description

    def _describe_end(self, event: Mapping[str, Any]) -> str:
        step = f"{event['step']:,}"
        end = {
            "done": f"Trained {count_of(event['step'], 'step')}",
            "patience": f"Stopped early at step {step}: no better validation loss",
        }.get(str(event.get("reason")), f"Ended at step {step}")
        loss, best = self._best
        return end + (
            f"; best {loss:.4f} at step {best:,}." if loss < math.inf else "."
        )


def _show_loss(loss: float | None) -> str:
    return "not finite" if loss is None or not math.isfinite(loss) else f"{loss:.4f}"


def _describe_skip(event: Mapping[str, Any]) -> str:
    names = list(event.get("samples") or ())
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    samples = f" ({', '.join(names[:MOST_NAMES])}{more})" if names else ""
    return f"batch skipped, its loss or gradient is not finite{samples}"
