"""The commands for the bundled recipes: `recipes list`, `show` and `copy`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.help.commands import Command, CommandGroup
from mlx_openelm.cli.help.examples import show_examples
from mlx_openelm.cli.options import Json
from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import cannot_access

recipes_app = typer.Typer(
    cls=CommandGroup,
    help="List, show or copy the bundled recipes for lora and pretrain.",
    epilog=show_examples("recipes"),
)
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name or file of a recipe.")]


@recipes_app.callback()
def _list_recipes(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        list_command()


@recipes_app.command("list", cls=Command, epilog=show_examples("recipes list"))
def list_command(as_json: Json = False) -> None:
    """List the bundled recipes, each with its first line."""
    from mlx_openelm.recipe_loader import bundled_recipes

    console = Console()
    summaries = {
        name: path.read_text().splitlines()[0].lstrip("# ")
        for name, path in bundled_recipes().items()
    }
    if as_json:
        console.answer_json(summaries)
        return
    width = max(map(len, summaries))
    for name, line in summaries.items():
        console.answer(f"{name:<{width}}  {line}")


@recipes_app.command("show", cls=Command, epilog=show_examples("recipes show"))
def show_command(name: Name) -> None:
    """Print a recipe."""
    from mlx_openelm.recipe_loader import read_recipe

    Console().answer(read_recipe(name), end="")


@recipes_app.command("copy", cls=Command, epilog=show_examples("recipes copy"))
def copy_command(
    name: Name,
    to: Annotated[
        Path | None,
        typer.Argument(
            metavar="TO",
            help="File or folder to write.",
            show_default="the recipe's file name",
        ),
    ] = None,
) -> None:
    """Copy a recipe to edit it. Prints the path."""
    from mlx_openelm.recipe_loader import find_recipe, read_recipe

    path, text = find_recipe(name), read_recipe(name)
    target = to or Path(path.name)
    if target.is_dir():
        target = target / path.name
    try:
        with target.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError as error:
        raise OpenELMError(f"{target} exists already; give another path.") from error
    except OSError as error:
        raise OpenELMError(cannot_access(target, error, "write")) from error
    Console().answer(str(target))
