"""Replaces parameter names in messages of the library by the command's flags."""

import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any

_PARAMETER = re.compile(r"`([a-z][a-z0-9_]*)`")
_flags: ContextVar[Mapping[str, str] | None] = ContextVar("flags", default=None)


def use_flags_of(command: Any, others: Iterable[Any] = ()) -> None:
    """Make `show_flags` write the flags of this Typer command from now on.

    Args:
        others: commands that provide the flags of parameters that `command` lacks.
    """
    flags: dict[str, str] = {}
    for known in (*others, command):
        for parameter in known.params:
            if parameter.param_type_name == "option":
                spellings = [flag for flag in parameter.opts if flag.startswith("--")]
                flags |= {flag[2:].replace("-", "_"): flag for flag in spellings}
                flags[parameter.name] = spellings[0]
    _flags.set(flags)


def show_flags(text: str) -> str:
    """Return a message in which "`window`" is "--window", if that is a flag."""
    flags = _flags.get() or {}
    return _PARAMETER.sub(lambda match: flags.get(match[1], match[0]), text)
