"""The command that checks a model folder: `verify`."""

from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Json, Offline, Quiet
from mlx_openelm.errors import OpenELMError


def verify_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="demo, a model folder, or a Hub id.")
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Source that the model was converted from; repeatable, for averages."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Check a model folder's files, weights and metadata."""
    from converters.conversion.verification import verify
    from mlx_openelm.cli.views.conversion import show_verification
    from mlx_openelm.storage.hub import find_model

    console = Console(quiet=quiet)
    with console.progress("Verifying") as progress:
        verification = verify(
            find_model(model, offline=offline),
            against=against or (),
            offline=offline,
            on_progress=lambda p: progress.update(p.done, p.total, p.units),
        )
    console.answer_report(verification, show_verification, as_json=as_json)
    if not verification.passed:
        raise OpenELMError(
            f"{model} failed verification: {verification.describe_problems()}."
        )
