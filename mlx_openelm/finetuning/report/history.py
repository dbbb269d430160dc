"""The history of a fine-tuning run: its metrics by kind, and sentences about them."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from mlx_openelm.reporting.run_history import read_number, read_points, read_step
from mlx_openelm.training.events import Event


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """The rows by kind, without those that a resumed run has replaced."""

    steps: Sequence[Event]
    evals: Sequence[Event]
    samples: Sequence[Event]
    skips: Sequence[Event]
    resumed: Sequence[float]  # steps after which the run was resumed
    best: Event | None  # of the evaluations
    end: Event | None
    last_step: float
    likelihood: bool  # of tokens: the exponential of the loss is the perplexity


def read_history(events: Iterable[Event], *, likelihood: bool) -> History:
    """Sort rows by kind; resuming from step S discards the rows of later steps."""
    rows: list[Event] = []
    for event in events:
        if event.get("event") == "resume":
            rows = [r for r in rows if read_step(r) <= read_step(event)]
            rows = [r for r in rows if r.get("event") != "end"]
        rows.append(event)
    kinds: dict[str, list[Event]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("event")), []).append(row)
    steps, evals = kinds.get("step", []), kinds.get("eval", [])
    known = [row for row in evals if read_number(row, "loss") is not None]
    called_best = [row for row in known if row.get("best") is True]
    lowest = min(known, key=lambda row: read_number(row, "loss") or 0.0, default=None)
    return History(
        steps=steps,
        evals=evals,
        samples=kinds.get("sample", []),
        skips=kinds.get("skip", []),
        resumed=[read_step(row) for row in kinds.get("resume", [])],
        best=called_best[-1] if called_best else lowest,
        end=kinds["end"][-1] if "end" in kinds else None,
        last_step=max((read_step(row) for row in rows), default=0.0),
        likelihood=likelihood,
    )


def describe_result(history: History) -> str:
    """Return a sentence about the change of the loss."""
    measured = read_points(history.evals, "loss")
    known = [(step, loss) for step, loss in measured if loss is not None]
    kind = "Validation loss"
    if not known:
        measured = read_points(history.steps, "loss")
        known = [(step, loss) for step, loss in measured if loss is not None]
        kind = "Training loss"
    if not known:
        return "No loss was recorded."
    unit = " nats per token" if history.likelihood else ""
    (first, before), (last, after) = known[0], known[-1]
    if len(known) == 1:
        return (
            f"{kind} {before:.3f}{unit}{_perplexities(history, before)}, measured "
            f"once, at step {first:,.0f}."
        )
    if kind == "Training loss":
        return (
            f"{kind} from {before:.3f} to {after:.3f}{unit}"
            f"{_perplexities(history, before, after)}; nothing was validated."
        )
    assert history.best is not None
    best, lowest = read_step(history.best), read_number(history.best, "loss") or 0.0
    if best == first or lowest >= before:
        return (
            f"{kind} did not fall: {before:.3f}{unit} at step {first:,.0f}, "
            f"{after:.3f} at step {last:,.0f}."
        )
    return (
        f"{kind} fell from {before:.3f} to {lowest:.3f}{unit}"
        f"{_perplexities(history, before, lowest)}, best at step {best:,.0f}."
    )


def _perplexities(history: History, *losses: float) -> str:
    if not history.likelihood:
        return ""
    values = [math.exp(min(loss, 700.0)) for loss in losses]
    shown = [f"{v:.2f}" if v < 1000 else f"{v:.2e}" for v in values]
    return f" (perplexity {' to '.join(shown)})"


def describe_end(history: History, failure: str | None = None) -> str:
    """Return sentences about the end of the run, resumes and skipped batches.

    Args:
        failure: why the run failed, if it did.
    """
    step = f"{history.last_step:,.0f}"
    trained = "1 step was" if step == "1" else f"All {step} steps were"
    reason = None if history.end is None else str(history.end.get("reason"))
    description = {
        None: f"No end was recorded: the run is in progress, or was killed after step "
        f"{step}.",
        "done": f"{trained} trained.",
        "patience": f"Stopped early, at step {step}: no better validation loss.",
        "interrupted": f"Interrupted at step {step}; --resume continues from there.",
    }.get(reason, f"Ended at step {step}: {reason}.")
    if failure is not None:
        description = f"Failed after step {step}: {failure}"
    if history.resumed:
        description += f" Resumed {_times(len(history.resumed))}."
    if history.skips:
        description += f" Skipped batches: {len(history.skips):,}."
    return description


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
