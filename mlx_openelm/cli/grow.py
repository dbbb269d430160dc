"""The command that makes a model larger: `grow`."""

import dataclasses
import os
from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Json, Offline, Quiet, Seed


def grow_command(
    source: Annotated[
        str, typer.Argument(help="A CoreNet .pt, a model folder, a Hub id or demo.")
    ],
    width: Annotated[
        int,
        typer.Option(help="Times as wide: model_dim and heads.", show_default=False),
    ],
    ffn: Annotated[
        int | None,
        typer.Option(help="Times as wide inside the FFNs.", show_default="as --width"),
    ] = None,
    noise_db: Annotated[
        float | None,
        typer.Option(
            help="Noise this far below the weights, which cancels; 10 is usual.",
            show_default="none",
        ),
    ] = None,
    seed: Seed = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="A folder; default ./<source name>-grown."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A file, a folder, a Hub id, or none.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a Hub id.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what was grown before.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Make a larger model that computes the same (HyperCloning). Prints the weights.

    Then: mlx-openelm pretrain -c RECIPE --init WEIGHTS.
    """
    console = Console(quiet=quiet)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when it is imported
    from converters.conversion.growing import grow

    with console.progress("Growing") as progress:
        report = grow(
            source,
            None if output is None else os.path.expanduser(output),
            width=width,
            ffn=ffn,
            noise_db=noise_db,
            seed=0 if seed is None else seed,
            tokenizer=tokenizer,
            force=force,
            offline=offline,
            revision=revision,
            on_progress=lambda p: progress.update(p.done, p.total, p.units),
        )
    if as_json:
        console.answer_json(dataclasses.asdict(report))
        return
    for note in report.notes:
        console.note(note)
    console.note(
        f"{report.kind}, {report.before:,} parameters -> {report.num_parameters:,} "
        f"({report.num_bytes / 1e6:,.0f} MB in float32), {report.seconds:.1f} s"
    )
    console.answer(str(report.path))
