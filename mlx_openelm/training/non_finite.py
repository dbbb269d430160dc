"""Batches whose loss or gradient is not finite: refused in a row."""

from collections.abc import Sequence

from mlx_openelm.errors import OpenELMError
from mlx_openelm.training.state import TrainingProgress

MOST_IN_A_ROW = 3


def refuse_repeated(
    progress: TrainingProgress, places: Sequence[str], kept: str
) -> None:
    """Refuse to train on after `MOST_IN_A_ROW` skipped batches in a row.

    Args:
        places: files and lines of the last batch's samples.
        kept: a clause on what is saved.

    Raises:
        OpenELMError: as many batches in a row were skipped.
    """
    if progress.skipped_in_row == MOST_IN_A_ROW:
        raise OpenELMError(
            f"Loss or gradient was not finite in {MOST_IN_A_ROW} batches in a "
            f"row, up to step {progress.step} ({', '.join(places[:4])}); nothing "
            "of them was learnt. Lower `learning_rate`, or look at these records; "
            f"{kept}"
        )
