"""Declaration of options as dataclass fields.

The flag and its help (`mlx_openelm.cli.derived_options`), the checks of the value
(`check_options`) and the recipe key are derived from the field. A module that declares
options imports neither mlx, numpy nor torch, so that `--help` is fast.
"""

import dataclasses
import numbers
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import plain_number

MODEL_PANEL = "Model and adapter"  # headings in --help that more than one command has
OUTPUT_PANEL = "Output"

_KEY = "option"
_LARGE = 1e6  # an upper limit that concerns only a value above it


@dataclass(frozen=True, slots=True)
class Option:
    """Metadata of an option, in addition to the field's name, type and default.

    Attributes:
        help: the help text; `{name}` refers to another option. None: the option is set
            in a recipe or from Python and has no flag.
        flags: names on the command line; by default the field's name with dashes.
        panel: the panel of --help that lists the flag.
        shown_default: the default in words, where it depends on data or model; `{name}`
            as in `help`, and `{default}` for the field's default.
        choices: the allowed values.
        least: the smallest allowed value.
        most: the largest allowed value.
        read: converts the string given to the flag (for a repeatable flag, the list of
            strings) to the value.
    """

    help: str | None = None
    flags: tuple[str, ...] = ()
    panel: str | None = None
    shown_default: str | None = None
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    read: Callable[[Any], Any] | None = None


def option(default: Any = MISSING, help: str | None = None, **details: Any) -> Any:
    """Return a dataclass field for an option; `details` are fields of `Option`."""
    return dataclasses.field(
        default=default, metadata={_KEY: Option(help=help, **details)}
    )


def option_of(field: "dataclasses.Field[Any]") -> Option:
    """Return the declaration of a field; an empty one if it is not an option."""
    declared: Option = field.metadata.get(_KEY, Option())
    return declared


def check_options(options: Any) -> None:
    """Raise OpenELMError if a field of a dataclass has a value that is not allowed.

    Numbers are checked against the field's type and limits, strings against its
    choices.
    """
    for name, kind, declared in _checked_fields(type(options)):
        value = getattr(options, name)
        if value is None:
            continue
        for choice in value if isinstance(value, tuple) else (value,):
            if declared.choices and choice not in declared.choices:
                raise OpenELMError(
                    f"`{name}` is {choice!r}; choose {', '.join(declared.choices)}."
                )
        if kind is not None:
            _check_number(name, value, kind, declared)


def _checked_fields(kind: type) -> list[tuple[str, type | None, Option]]:
    """Return each field's name, number type (None if not a number) and declaration."""
    hints = typing.get_type_hints(kind)
    return [
        (field.name, _number_type(hints[field.name]), option_of(field))
        for field in dataclasses.fields(kind)
    ]


def _number_type(hint: Any) -> type | None:
    kinds = {hint}
    if isinstance(hint, types.UnionType):
        kinds = set(typing.get_args(hint)) - {types.NoneType}
    return next(iter(kinds)) if kinds in ({int}, {float}) else None


def _check_number(name: str, value: Any, kind: type, declared: Option) -> None:
    whole = kind is int
    expected = numbers.Integral if whole else numbers.Real
    if not isinstance(value, expected) or isinstance(value, bool):
        raise OpenELMError(
            f"`{name}` is {value!r}; it must be a {'whole ' if whole else ''}number."
        )
    least = -float("inf") if declared.least is None else declared.least
    most = float("inf") if declared.most is None else declared.most
    number: Any = value  # not converted: a float would round large integers
    if not least <= number <= most:
        low, high = plain_number(least), plain_number(most)
        allowed = f"from {low} to {high}"
        if declared.most is None or (number < least and most >= _LARGE):
            allowed = f"{low} or more"
        elif number > most >= _LARGE:
            allowed = f"at most {high}"
        raise OpenELMError(f"`{name}` is {value}; it must be {allowed}.")
