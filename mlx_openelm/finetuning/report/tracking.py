"""The metrics of a fine-tuning run for experiment trackers."""

import dataclasses
from types import TracebackType
from typing import Self

from mlx_openelm.finetuning.run_context import RunContext
from mlx_openelm.reporting.trackers import Trackers
from mlx_openelm.training.events import Event

_GROUPS = {"step": "train", "eval": "eval", "test": "test"}


class MetricsTracking:
    """Sends each event with numbers, and each sample, to the recipe's trackers."""

    def __init__(self, run: RunContext) -> None:
        self._trackers = Trackers(
            run.recipe.report_to,
            run.folder,
            config=dataclasses.asdict(run.recipe),
            first_step=run.progress.step,
            on_failure=run.log.note,
        )

    def __enter__(self) -> Self:
        return self

    def __call__(self, event: Event) -> None:
        kind = str(event.get("event"))
        if kind in _GROUPS:
            self._trackers.log(_GROUPS[kind], event)
        elif kind == "sample":
            text = f"{event['prompt']}{event['text']}"
            self._trackers.log_text(event["step"], f"sample/{event['prompt']}", text)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._trackers.close()
