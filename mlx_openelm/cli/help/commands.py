"""Typer's classes of commands, with a plainer --help and clearer usage errors."""

import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

from mlx_openelm.paths import expand_home

# Parameters that are texts; every other one can be a path.
TEXTS = (
    *("prompt", "prompt_option", "system", "stop", "sample_prompt", "keep"),
    *("regex", "api_key"),
)
_ADVICE = {  # for a command that does not take the argument {}
    "lora": "give examples with --data {}",
    "pretrain": "give a recipe with --recipe {}",
    "evaluate": "give a text with --text {}, or questions with --tasks {}",
    "fuse": "give an adapter with --adapter-path {}",
    "chat": "chat reads messages from stdin; give a model with --model {}",
    "serve": "give a model with --model {}",
    "bench": "give a model with --model {}",
}


class Command(TyperCommand):
    """A command; "~" is expanded in the values of all parameters but texts."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; report arguments that the command does not take, with what to do."""
        ctx.allow_extra_args = True
        parameters = self.get_params(ctx)
        args = _add_empty_values(parameters, _repeat_options(parameters, args))
        rest = super().parse_args(ctx, args)
        if rest and not ctx.resilient_parsing:
            ctx.fail(f"{_describe_extra(ctx, rest)}.")
        ctx.params.update(
            {n: _expand(v) for n, v in ctx.params.items() if n not in TEXTS}
        )
        return rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _simplify_help(self, ctx)
        super().format_help(ctx, formatter)


class CommandGroup(TyperGroup):
    """A command with subcommands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _simplify_help(self, ctx)
        super().format_help(ctx, formatter)


def _repeat_options(parameters: list[Any], args: list[str]) -> list[str]:
    """Repeat an option before each of its values, as the parser needs it.

    These are options with a metavar that ends in "...".
    """
    several = _flags_of(parameters, lambda metavar: metavar.endswith("..."))
    repeated: list[str] = []
    option = ""
    for arg in args:
        if arg.startswith("-"):
            option = arg if arg in several else ""
        elif option and repeated[-1] != option:
            repeated.append(option)
        repeated.append(arg)
    return repeated


def _add_empty_values(parameters: list[Any], args: list[str]) -> list[str]:
    """Insert an empty value after options whose value was left out.

    These are options with a metavar in brackets, before another option or at the end.
    """
    optional = _flags_of(parameters, lambda metavar: metavar.startswith("["))
    filled = []
    for arg, following in pairwise([*args, "-"]):
        filled.append(arg)
        if arg in optional and following.startswith("-"):
            filled.append("")
    return filled


def _flags_of(parameters: list[Any], fits: Callable[[str], bool]) -> set[str]:
    """Return the flags of the options whose metavar fits."""
    return {
        flag
        for parameter in parameters
        if fits(parameter.metavar or "")
        for flag in parameter.opts
        if flag.startswith("-")
    }


def _expand(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_expand, value))
    return type(value)(expand_home(value)) if isinstance(value, str | Path) else value


def _simplify_help(command: Any, ctx: Any) -> None:
    """Fill paragraphs, hide "<bool>" of switches, and use one format for defaults.

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


def _describe_extra(ctx: Any, extra: list[str]) -> str:
    """Return what to do about arguments that a command does not take."""
    words = [ctx.params.get("prompt_option"), ctx.params.get("prompt"), *extra]
    if words[1]:
        prompt = " ".join(word for word in words if word)
        return f"A prompt of more than one word needs quotes: {shlex.quote(prompt)}"
    advice = _ADVICE.get(ctx.info_name, "quote a value that contains spaces")
    value = extra[0] if len(extra[0]) <= 200 else "VALUE"
    return f"Unexpected: {shlex.join(extra)}; {advice.replace('{}', value)}"
