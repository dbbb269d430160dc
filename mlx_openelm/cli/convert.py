"""The command that converts: `convert`."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import typer

from converters.conversion.options import (  # noqa: TID253 - needs no mlx
    QUANTIZATION,
    ConversionOptions,
)
from mlx_openelm.cli.console import Console
from mlx_openelm.cli.derived_options import GivenOptions, OptionsOf, derive_options
from mlx_openelm.cli.options import Force, Json, Offline, Quiet, expand_path


@derive_options
def convert_command(
    *,
    source: Annotated[
        list[str] | None,
        typer.Argument(
            help="A CoreNet .pt, a model or adapter folder, a Hub id or demo; several "
            ".pt with --average."
        ),
    ] = None,
    hf_path: Annotated[
        str | None,
        typer.Option(
            "--hf-path", "--model", help="The same; or the base of an adapter folder."
        ),
    ] = None,
    mlx_path: Annotated[
        Path | None, typer.Option(help="Where to; default ./<source name>-mlx[-4bit].")
    ] = None,
    options: Annotated[GivenOptions, OptionsOf(ConversionOptions)],
    quantize: Annotated[
        bool,
        typer.Option(
            "-q",
            "--quantize",
            help="Quantize, to 4 bits unless --q-bits or --q-mode is given.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = False,
    adapter_out: Annotated[
        Path | None,
        typer.Option(help="Write the adapter of the source here."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a Hub id.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Make a model folder, which mlx-openelm and mlx-lm read. Prints its path."""
    console = Console(quiet=quiet)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when it is imported
    if source and hf_path and options.get("average"):
        raise typer.BadParameter("say the sources once", param_hint="--model")
    named = list(source or ())
    base = hf_path if named else None
    if not named and hf_path is not None:
        named = [hf_path]
    if not named:
        raise typer.BadParameter("say what to convert", param_hint="SOURCE")
    if quantize and not options.keys() & {"bits", "mode"}:
        options["bits"] = "4"
    if options.get("mode") == "affine":
        options.setdefault("bits", "4")
    from converters.conversion.run import convert

    with console.progress("Converting") as progress:
        report = convert(
            named,
            expand_path(mlx_path),
            adapter_out=expand_path(adapter_out),
            revision=revision,
            force=force,
            offline=offline,
            base=base,
            on_progress=lambda p: progress.update(p.done, p.total, p.units),
            **options,
        )
    from converters.conversion.adapters import AdapterReport
    from mlx_openelm.cli.views.conversion import note_adapter, note_converted

    if as_json:
        console.answer_json(dataclasses.asdict(report))
        return
    if isinstance(report, AdapterReport):
        note_adapter(console, report)
    else:
        note_converted(console, report)
    console.answer(str(report.path))
