"""The command that describes a model folder: `inspect`."""

from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Json, Offline, Quiet


def inspect_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="demo, a model folder, or a Hub id.")
    ],
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Context length in tokens for the memory estimate.",
            show_default="the model's",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Show a model's sizes, bits, tokenizer, origin and memory use.

    No weights are loaded.
    """
    from mlx_openelm.cli.views.conversion import show_inspection
    from mlx_openelm.storage.hub import find_model
    from mlx_openelm.storage.inspection import inspect

    console = Console(quiet=quiet)
    inspection = inspect(find_model(model, offline=offline), context=context)
    for note in inspection.notes:
        console.note(note)
    console.answer_report(inspection, show_inspection, as_json=as_json)
