"""The result of an evaluation: on stdout, and as a .csv file and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.evaluation.checkpoints import Checkpoint

if TYPE_CHECKING:
    from mlx_openelm.evaluation.results import ModelScores
    from mlx_openelm.evaluation.suites import Suite


def report_scores(
    console: Console,
    scores: Sequence["ModelScores"],
    suite: "Suite | None",
    csv: Path | None,
    picture: Path | None,
    *,
    as_json: bool,
) -> None:
    """Write the scores of models, and the files that the options name."""
    from mlx_openelm.cli.views.evaluation import scores_json, show_scores, to_csv
    from mlx_openelm.cli.views.evaluation_picture import draw_evaluation

    if as_json:
        console.answer_json(scores_json(scores, suite))
    else:
        show_scores(console, scores, suite)
    _write_reports(
        console,
        (csv, to_csv(scores, suite) if csv else ""),
        (picture, draw_evaluation(scores, suite) if picture else ""),
    )


def report_checkpoints(
    console: Console,
    checkpoints: Sequence[Checkpoint],
    scores: Sequence["ModelScores"],
    suite: "Suite | None",
    csv: Path | None,
    picture: Path | None,
    *,
    as_json: bool,
) -> None:
    """Write the scores of the first of some checkpoints, as `report_scores` does."""
    from mlx_openelm.cli.views.checkpoints import (
        Curves,
        checkpoints_json,
        draw_checkpoints,
        show_checkpoints,
    )
    from mlx_openelm.cli.views.evaluation import to_csv

    curves = Curves([c.iteration for c in checkpoints[: len(scores)]], scores, suite)
    if as_json:
        console.answer_json(checkpoints_json(curves))
    else:
        show_checkpoints(console, curves)
    _write_reports(
        console,
        (csv, to_csv(scores, suite) if csv else ""),
        (picture, draw_checkpoints(curves) if picture else ""),
    )


def _write_reports(console: Console, *reports: tuple[Path | None, str]) -> None:
    from mlx_openelm.storage.staging import replaced_file

    for path, content in reports:
        if path is not None:
            with replaced_file(path) as part:
                part.write_text(content, encoding="utf-8")
            console.note(f"Written to {path}")
