"""The base class of the views of fine-tuning and pre-training."""

from typing import Self

from mlx_openelm.cli.console import Console, ProgressBar, escape_controls

MOST_CHARACTERS = 300  # of a generated sample


class RunView:
    """Shows steps in a progress bar and other events in a line each.

    The bar is closed at the end of the `with` block.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = ProgressBar("Training", console)
        self._steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.close()

    def _note(self, step: int, text: str) -> None:
        self._console.note(f"step {step:,}: {text}")


def show_sample(text: str) -> str:
    """Return a text on one line, without control characters."""
    line = escape_controls(" ".join(text.split()))
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}..."
