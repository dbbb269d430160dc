"""The command that describes a model folder: `inspect`."""

from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Json, Offline, Quiet


def inspect_command(
    model: Annotated[str, typer.Argument(help="demo, a model folder, or a Hub id.")],
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens to reckon the memory for.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Show sizes, bits, tokenizer, origin and memory, without loading weights."""
    from mlx_openelm.cli.views.conversion import show_inspection
    from mlx_openelm.storage.hub import find_model
    from mlx_openelm.storage.inspection import inspect

    console = Console(quiet=quiet)
    found = inspect(find_model(model, offline=offline), context=context)
    console.answer_report(found, show_inspection, as_json=as_json)
