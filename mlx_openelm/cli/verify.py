"""The command that checks a model folder: `verify`."""

from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Json, Offline, Quiet
from mlx_openelm.errors import OpenELMError


def verify_command(
    model: Annotated[str, typer.Argument(help="demo, a model folder, or a Hub id.")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="What it was made from; repeatable, if it was averaged."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Check that a folder is whole, and what it says it is."""
    from converters.conversion.verification import verify
    from mlx_openelm.cli.views.conversion import show_verification
    from mlx_openelm.storage.hub import find_model

    console = Console(quiet=quiet)
    with console.progress("Verifying") as progress:
        found = verify(
            find_model(model, offline=offline),
            against=against or (),
            offline=offline,
            on_progress=lambda p: progress.update(p.done, p.total, p.units),
        )
    console.answer_report(found, show_verification, as_json=as_json)
    if not found.passed:
        raise OpenELMError(
            f"{model} is not what it should be: {found.describe_problems()}; convert "
            "or download it again."
        )
