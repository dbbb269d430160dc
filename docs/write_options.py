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
    subcommands = getattr(command, "commands", {})
    if not subcommands:
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([path, "[OPTIONS]", *map(_spell_argument, arguments)])
        yield f"```text\n{usage}\n```\n"
        for panel, parameters in _panels(command).items():
            meaning = "Argument" if panel == "Arguments" else "Option"
            yield f"### {panel}\n\n| {meaning} | Meaning |\n|---|---|"
            for parameter in parameters:
                names = f"`{_names(parameter)}`".replace("|", r"\|")
                yield f"| {names} | {_meaning(parameter)} |"
            yield ""
    for name, subcommand in subcommands.items():
        yield f"### {path.split()[-1]} {name}\n"
        yield f"{subcommand.help}\n"
        yield from _describe(subcommand, f"{path} {name}")


def _panels(command: Any) -> dict[str, list[Any]]:
    """Return the parameters by the headings of --help, --help itself left out."""
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        argument = parameter.param_type_name == "argument"
        panel = getattr(parameter, "rich_help_panel", None)
        panels.setdefault(panel or ("Arguments" if argument else "Options"), []).append(
            parameter
        )
    return panels


def _spell_argument(parameter: Any) -> str:
    name = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _names(parameter: Any) -> str:
    """Return the flags and value type of an option, or the name of an argument."""
    if parameter.param_type_name == "argument":
        return _spell_argument(parameter)
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {_value(parameter)}"


def _value(parameter: Any) -> str:
    """Return the kind of value; Typer's own names for it differ by version."""
    if parameter.metavar:
        return str(parameter.metavar)
    context = typer.Context(typer.main.get_command(app))
    shown = parameter.get_help_record(context)[0].rpartition(" ")[2].lower()
    kinds = {"int": "N", "range": "N", "float": "X", "path": "PATH"}
    return next((short for part, short in kinds.items() if part in shown), "TEXT")


def _meaning(parameter: Any) -> str:
    text = re.sub(r"\s+", " ", parameter.help or "").rstrip(".")
    shown = parameter.show_default
    if not isinstance(shown, str):
        default = parameter.default
        shown = "" if not shown or default is None or default is False else str(default)
    extras = [f"default: {shown}"] * bool(shown)
    extras += [f"environment: {parameter.envvar}"] * bool(parameter.envvar)
    extras += ["required"] * parameter.required
    text = ". ".join([text, *(extra[0].upper() + extra[1:] for extra in extras)])
    return re.sub(r"([|*_\[\]])", r"\\\1", f"{text}.".replace("<", "&lt;"))


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
