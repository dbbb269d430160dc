"""The command that scores: `evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_openelm.command_options import (
    Adapter,
    Json,
    Model,
    Offline,
    Quiet,
    open_model,
)
from mlx_openelm.console import Console


def evaluate(
    text: Annotated[list[Path], typer.Option(help="A text file to score; repeatable.")],
    model: Model = None,
    adapter_path: Adapter = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens in a window; default the context length.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Score how well a model predicts text files: bits per byte, perplexity."""
    console = Console(quiet=quiet)
    from mlx_openelm.evaluation import evaluate as run
    from mlx_openelm.report import as_json as fields
    from mlx_openelm.report import show_score

    _, loaded, tokenizer = open_model(console, model, adapter_path, offline)
    with console.progress("Scoring") as progress:
        score = run(
            loaded,
            tokenizer,
            text=text,
            window=window,
            on_progress=lambda done, total: progress.update(done, total, "windows"),
        )
    if as_json:
        console.answer_json(fields(score))
    else:
        show_score(console, score)
