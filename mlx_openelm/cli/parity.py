"""The command that compares PyTorch and MLX: `parity`."""

from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Json, Quiet, need_torch
from mlx_openelm.errors import OpenELMError


def parity_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="CoreNet .pt file, model folder, Hub id or demo."
        ),
    ],
    num_tokens: Annotated[
        int, typer.Option(min=1, help="Number of random tokens to compare on.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the random tokens.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare PyTorch and MLX layer by layer on the same tokens (needs PyTorch)."""
    need_torch()
    from converters.parity import compare_with_reference
    from mlx_openelm.cli.views.parity import show_parity

    console = Console(quiet=quiet)
    report = compare_with_reference(source, num_tokens=num_tokens, seed=seed)
    console.answer_report(report, show_parity, as_json=as_json)
    if not report.equal:
        raise OpenELMError(
            f"PyTorch and MLX differ on {source} by more than {report.limit:.0e}."
        )
