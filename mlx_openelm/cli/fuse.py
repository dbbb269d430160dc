"""The command that merges an adapter into its base: `fuse`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Force, Json, Offline, Quiet


def fuse_command(
    adapter_path: Annotated[
        str, typer.Option(help="An adapter folder, or its Hub id.", show_default=False)
    ],
    save_path: Annotated[Path, typer.Option(help="Where to.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="The base; default the adapter's own.")
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write 16 bits a weight.")
    ] = False,
    quantize: Annotated[
        bool, typer.Option("-q", "--quantize", help="Quantize to --q-bits.")
    ] = False,
    bits: Annotated[
        int | None,
        typer.Option("--q-bits", help="Bits of the linears; default the base's own."),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option("--q-group-size", help="Weights that share a scale, default 64."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Put an adapter into its base, and prove that it is still there. Prints the path.

    Nothing is written if the weights' bits would lose it.
    """
    console = Console(quiet=quiet)
    if quantize and bits is None:
        bits = 4
    from converters.conversion.fusing import fuse
    from mlx_openelm.cli.views.conversion import show_fused

    with console.progress("Fusing") as progress:
        report = fuse(
            os.path.expanduser(adapter_path),
            os.path.expanduser(save_path),
            base=model,
            dequantize=dequantize,
            bits=bits,
            group_size=group_size,
            force=force,
            offline=offline,
            on_progress=lambda p: progress.update(p.done, p.total, p.units),
        )
    console.answer_report(report, show_fused, as_json=as_json)
