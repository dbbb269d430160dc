"""A fine-tuning run on the terminal, told by the rows of its metrics.jsonl."""

import math
import types
from collections.abc import Mapping
from typing import Any, Self

from mlx_openelm.cli.console import Console, Progress

MOST_CHARACTERS = 300  # of a sample of text
MOST_NAMES = 8  # of a skipped batch


class TrainingView:
    """Shows each row as it comes: steps in a bar, the rest in a line each.

    Besides the rows of metrics.jsonl it knows {"event": "note", "text": ...}, and any
    row may tell the length of the run as "steps". Leaving the `with` block ends it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress("Training", console)
        self._steps = 0
        self._validation = math.nan  # the last
        self._best = (math.inf, 0)  # and the step

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._progress.close()

    def __call__(self, event: Mapping[str, Any]) -> None:
        self._steps = event.get("steps") or self._steps
        match event.get("event"):
            case "step":
                self._show_step(event)
            case "eval":
                self._note(event, self._describe_eval(event))
            case "sample":
                self._note(event, _describe_sample(event))
            case "skip":
                self._note(event, _describe_skip(event))
            case "save":
                self._note(event, "saved")
            case "resume":
                self._console.note(f"Going on after step {event['step']:,}.")
            case "note":
                self._console.note(str(event["text"]))
            case "end":
                self._progress.close()
                self._console.note(self._describe_end(event))

    def _show_step(self, event: Mapping[str, Any]) -> None:
        words = [f"loss {_show_loss(event.get('loss'))}"]
        if not math.isnan(self._validation):
            words.append(f"valid {self._validation:.3f}")
        if event.get("accuracy") is not None:
            words.append(f"accuracy {event['accuracy']:.0%}")
        words.append(f"{event.get('tokens_per_second') or 0:,.0f} tokens/s")
        step = event["step"]
        self._progress.update(step, max(step, self._steps), ", ".join(words))

    def _describe_eval(self, event: Mapping[str, Any]) -> str:
        loss = event.get("loss")
        said = f"validation loss {_show_loss(loss)}"
        if loss is not None and math.isfinite(loss):
            self._validation = loss
            if event.get("best"):
                self._best = (loss, event["step"])
                said += ", the best" if event["step"] else ", before training"
        return said

    def _describe_end(self, event: Mapping[str, Any]) -> str:
        step = f"{event['step']:,}"
        said = {
            "done": f"Trained {step} steps",
            "patience": f"Stopped early at step {step}: validation loss fell no more",
            "interrupted": f"Interrupted at step {step}",
        }.get(str(event.get("reason")), f"Ended at step {step}")
        loss, best = self._best
        return said + (
            f"; best {loss:.4f} at step {best:,}." if loss < math.inf else "."
        )

    def _note(self, event: Mapping[str, Any], text: str) -> None:
        self._console.note(f"step {event['step']:,}: {text}")


def _show_loss(loss: float | None) -> str:
    return "not finite" if loss is None or not math.isfinite(loss) else f"{loss:.4f}"


def _describe_sample(event: Mapping[str, Any]) -> str:
    """Return prompt and text on one line, without what a terminal would obey."""
    text = " ".join(f"{event['prompt']}{event['text']}".split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def _describe_skip(event: Mapping[str, Any]) -> str:
    names = list(event.get("samples") or ())
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    samples = f" ({', '.join(names[:MOST_NAMES])}{more})" if names else ""
    return f"batch skipped, its loss or gradient is not finite{samples}"
