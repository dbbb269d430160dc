"""The command group of the bundled recipes: `recipes list`, `show` and `copy`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Json
from mlx_openelm.errors import OpenELMError

recipes_app = typer.Typer(help="List, show or copy the bundled recipes.")


@recipes_app.callback()
def _list_recipes(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        list_command()


@recipes_app.command("list")
def list_command(as_json: Json = False) -> None:
    """List the bundled recipes, each with its first line."""
    from mlx_openelm.recipe_loader import bundled_recipes

    console = Console()
    found = {
        name: path.read_text().splitlines()[0].lstrip("# ")
        for name, path in bundled_recipes().items()
    }
    if as_json:
        console.answer_json(found)
        return
    width = max(map(len, found))
    for name, line in found.items():
        console.answer(f"{name:<{width}}  {line}")


@recipes_app.command("show")
def show_command(name: Annotated[str, typer.Argument(help="A recipe's name.")]) -> None:
    """Print a recipe."""
    from mlx_openelm.recipe_loader import read_recipe

    Console().answer(read_recipe(name), end="")


@recipes_app.command("copy")
def copy_command(
    name: Annotated[str, typer.Argument(help="A recipe's name.")],
    to: Annotated[
        Path | None, typer.Argument(help="Where to; default its own file name here.")
    ] = None,
) -> None:
    """Copy a recipe, to be edited. Prints the path."""
    from mlx_openelm.recipe_loader import find_recipe, read_recipe

    path, text = find_recipe(name), read_recipe(name)
    target = to or Path(path.name)
    if target.is_dir():
        target = target / path.name
    try:
        with target.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError as error:
        raise OpenELMError(f"{target} exists already; say another place.") from error
    except OSError as error:
        raise OpenELMError(f"Cannot write {target}: {error}.") from error
    Console().answer(str(target))
