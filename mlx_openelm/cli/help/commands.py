"""Typer's classes of commands, with a plainer --help."""

from typing import Any

from typer.core import TyperCommand, TyperGroup


class Command(TyperCommand):
    """A command."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _simplify_help(self, ctx)
        super().format_help(ctx, formatter)


class CommandGroup(TyperGroup):
    """A command with subcommands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _simplify_help(self, ctx)
        super().format_help(ctx, formatter)


def _simplify_help(command: Any, ctx: Any) -> None:
    """Fill paragraphs, hide "<bool>" of switches, and show every default alike.

    Typer keeps the line breaks of a docstring, and sets defaults in words in brackets:
    "[default: (none)]".
    """
    from rich.markup import escape

    paragraphs = (command.help or "").split("\n\n")
    command.help = "\n\n".join(" ".join(text.split()) for text in paragraphs)
    for parameter in command.get_params(ctx):
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
        if isinstance(parameter.show_default, str):
            shown = escape(f"[default: {parameter.show_default}]")
            parameter.help = f"{parameter.help} [dim]{shown}[/dim]"
            parameter.show_default = False
