"""The command that makes a larger model: `grow`."""

import dataclasses
import os
from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Force, Json, Offline, Quiet
from mlx_openelm.options import MODEL_PANEL, OUTPUT_PANEL


def grow_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="CoreNet .pt file, model folder, Hub id or demo."
        ),
    ],
    width: Annotated[
        int,
        typer.Option(
            help="Factor of the width: model_dim and the number of heads.",
            show_default=False,
        ),
    ],
    ffn: Annotated[
        int | None,
        typer.Option(
            help="Factor of the width inside the FFNs.", show_default="as --width"
        ),
    ] = None,
    noise_db: Annotated[
        float | None,
        typer.Option(
            help="Add noise this many dB below the weights, to break the symmetry of "
            "the copies; the function stays the same. 10 is usual.",
            show_default="no noise",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Tokenizer to write into the folder: a file, a folder, a Hub id, or "
            "none.",
            show_default="the source's",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            help="Branch, tag or commit of a Hub id.", rich_help_panel=MODEL_PANEL
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder to write.",
            show_default="<source name>-grown",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Make a larger model with the same function (HyperCloning), to train further.

    Prints the path of the weights, which `mlx-openelm pretrain --init` starts from.
    """
    console = Console(quiet=quiet)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read at import
    from converters.conversion.growing import grow

    with console.progress("Growing") as progress:
        report = grow(
            source,
            output,
            width=width,
            ffn=ffn,
            noise_db=noise_db,
            seed=seed,
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
    console.note_next(
        *("pretrain", "--recipe", "pretrain/growing/large"),
        *("--init", report.path, "--dry-run"),
    )
