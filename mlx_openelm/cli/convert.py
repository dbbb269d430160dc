"""The command that converts models and adapters: `convert`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from converters.conversion.options import (  # noqa: TID253 - needs no mlx
    ConversionOptions,
)
from mlx_openelm.cli.console import Console
from mlx_openelm.cli.derived_options import GivenOptions, OptionsOf, derive_options
from mlx_openelm.cli.options import Force, Json, Offline, Quiet
from mlx_openelm.cli.uploading import (
    Public,
    UploadRepo,
    answer_and_upload,
    check_upload,
)
from mlx_openelm.options import MODEL_PANEL


@derive_options
def convert_command(
    *,
    source: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="Hub id, released name (OpenELM-270M), CoreNet .pt file or its "
            "https address, model or adapter folder, or demo; more than one .pt file "
            "with --average.",
        ),
    ] = None,
    hf_path: Annotated[
        str | None,
        typer.Option(
            "--hf-path",
            "--model",
            help="Base model of an adapter; without SOURCE, the source.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    mlx_path: Annotated[
        Path | None,
        typer.Option(
            help="Folder or file to write.", show_default="<source name>-mlx, -mlx-4bit"
        ),
    ] = None,
    quantize: Annotated[
        bool,
        typer.Option(
            "-q",
            "--quantize",
            help="Quantize, to 4 bits unless --q-bits or --q-mode is given.",
        ),
    ] = False,
    options: Annotated[GivenOptions, OptionsOf(ConversionOptions)],
    adapter_out: Annotated[
        Path | None,
        typer.Option(
            help="Write the adapter of the source to this folder, instead of merging.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            help="Branch, tag or commit of a Hub id.", rich_help_panel=MODEL_PANEL
        ),
    ] = None,
    upload_repo: UploadRepo = None,
    public: Public = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Convert a model or an adapter, for mlx-openelm and mlx-lm by default.

    Prints the path of the folder or file.
    """
    console = Console(quiet=quiet)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read at import
    if source and hf_path and options.get("average"):
        raise typer.BadParameter(
            "cannot be used with SOURCE and --average", param_hint="--model"
        )
    named = list(source or ())
    base = hf_path if named else None
    if not named and hf_path is not None:
        named = [hf_path]
    if not named:
        raise typer.BadParameter(_list_sources(), param_hint="SOURCE")
    if quantize and not options.keys() & {"bits", "mode"}:
        options["bits"] = "4"
    if options.get("mode") == "affine":
        options.setdefault("bits", "4")
    if upload_repo is not None and options.get("to") in ("corenet", "gguf"):
        raise typer.BadParameter(
            f"uploads a folder, but --to {options['to']} writes one file; upload it "
            f"with `hf upload {upload_repo} FILE{'' if public else ' --private'}`",
            param_hint="--upload-repo",
        )
    target = check_upload(upload_repo, public=public, offline=offline)
    from converters.conversion.run import convert

    with console.progress("Converting") as progress:
        report = convert(
            named,
            mlx_path,
            adapter_out=adapter_out,
            revision=revision,
            force=force,
            offline=offline,
            base=base,
            on_progress=lambda p: progress.update(p.done, p.total, p.units),
            **options,
        )
    from converters.conversion.adapters import AdapterReport
    from mlx_openelm.cli.views.conversion import show_adapter, show_converted

    show = show_adapter if isinstance(report, AdapterReport) else show_converted
    answer_and_upload(console, report, show, target, as_json=as_json)


def _list_sources() -> str:
    from mlx_openelm.storage.hub import RELEASED

    return "\n".join(
        (
            "nothing to convert. Give one of",
            *(f"  {name}" for name in RELEASED),
            "  another Hub id",
            "  a CoreNet checkpoint (.pt), or its https address",
            "  a model or adapter folder",
            "  demo",
        )
    )
