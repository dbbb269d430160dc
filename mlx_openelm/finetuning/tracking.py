"""The metrics of a fine-tuning run for experiment trackers."""

import dataclasses
from types import TracebackType
from typing import Self

from mlx_openelm.finetuning.preparation import Prepared
from mlx_openelm.finetuning.report_history import Event
from mlx_openelm.finetuning.trainer import Training
from mlx_openelm.reporting.trackers import Trackers

_GROUPS = {"step": "train", "eval": "eval", "test": "test"}


class MetricsTracking:
    """Sends each event with numbers, and each sample, to the recipe's trackers."""

    def __init__(self, prepared: Prepared, training: Training) -> None:
        self._trackers = Trackers(
            prepared.recipe.report_to,
            prepared.path,
            config=dataclasses.asdict(prepared.recipe),
            first_step=training.progress.step,
            on_failure=training.note,
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
