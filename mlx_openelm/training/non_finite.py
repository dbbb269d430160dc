"""Limit on consecutive batches whose loss or gradient is not finite."""

from collections.abc import Sequence

from mlx_openelm.errors import OpenELMError
from mlx_openelm.training.state import TrainingProgress

MAX_SKIPPED_IN_A_ROW = 3


def refuse_repeated(
    progress: TrainingProgress, places: Sequence[str], saved: str
) -> None:
    """Raise after `MAX_SKIPPED_IN_A_ROW` skipped batches in a row.

    Args:
        places: files and lines of the last batch's samples.
        saved: a sentence that states what is saved.

    Raises:
        OpenELMError: the last batches were all skipped.
    """
    if progress.skipped_in_row == MAX_SKIPPED_IN_A_ROW:
        raise OpenELMError(
            f"Loss or gradient was not finite in {MAX_SKIPPED_IN_A_ROW} batches in a "
            f"row, up to step {progress.step} ({', '.join(places[:4])}). Lower "
            f"`learning_rate`, or check these records. {saved}"
        )
