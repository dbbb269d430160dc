"""Writes the options of each command into its page, as its --help has them.

    python docs/write_options.py

A page has them between the lines of `START` and `END`. A test holds that they are
up to date.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mlx_openelm.cli.main import app

COMMANDS = Path(__file__).resolve().parent / "commands"
START = "<!-- options: written by docs/write_options.py -->"
END = "<!-- end of options -->"


def commands() -> dict[str, Any]:
    """Return the commands by name."""
    return dict(typer.main.get_command(app).commands)


def options_section(name: str) -> str:
    """Return a command's usage and options in Markdown, grouped as in --help."""
    return "\n".join(_describe(commands()[name], f"mlx-openelm {name}"))


def _describe(command: Any, path: str) -> Iterator[str]:
    context = typer.Context(command, info_name=path)
    subcommands = getattr(command, "commands", {})
    if not subcommands:
        usage = " ".join(command.collect_usage_pieces(context))
        yield f"```text\n{path} {usage}\n```\n"
    groups: dict[str, list[Any]] = {}
    for parameter in command.get_params(context):
        if "--help" not in parameter.opts:
            default = (
                "Arguments" if parameter.param_type_name == "argument" else "Options"
            )
            panel = getattr(parameter, "rich_help_panel", None) or default
            groups.setdefault(panel, []).append(parameter)
    for panel, parameters in groups.items():
        meaning = "Argument" if panel == "Arguments" else "Option"
        yield f"### {panel}\n\n| {meaning} | Meaning |\n|---|---|"
        for parameter in parameters:
            names, text = parameter.get_help_record(context)
            yield f"| {_code(names)} | {_cell(text)} |"
        yield ""
    for name, subcommand in subcommands.items():
        yield f"### {path.split()[-1]} {name}\n"
        yield f"{subcommand.help}\n"
        yield from _describe(subcommand, f"{path} {name}")


def _code(names: str) -> str:
    return f"`{names}`".replace("|", r"\|")


def _cell(text: str) -> str:
    text = re.sub(r"\s+", " ", text).replace("<", "&lt;")
    return re.sub(r"([|*_\[\]])", r"\\\1", text)


def update_options() -> None:
    """Rewrite the section of each command's page that is out of date."""
    for name in commands():
        page = COMMANDS / f"{name}.md"
        before, rest = page.read_text(encoding="utf-8").split(START)
        after = rest.partition(END)[2]
        text = f"{before}{START}\n\n{options_section(name)}\n{END}{after}"
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    update_options()
