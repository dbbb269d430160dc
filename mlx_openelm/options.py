"""Options that are declared once: as the fields of a dataclass.

`option` makes such a field. From it follow the flag of the command line with its help
(`mlx_openelm.cli.derived_options`), the checks of its value (`check_options`) and the
key of a recipe. A module that declares options imports neither mlx, numpy nor torch,
so that `--help` needs none of them.
"""

import dataclasses
import numbers
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from typing import Any

from mlx_openelm.errors import OpenELMError

_KEY = "option"


@dataclass(frozen=True, slots=True)
class Option:
    """What a field says of itself beside its name, type and default.

    Attributes:
        help: the text of the flag; `{name}` in it stands for another option. None: the
            option is set in a recipe or from Python, and has no flag.
        flags: of the command line; by default the name with dashes.
        panel: the heading in --help under which the flag stands.
        shown_default: the default in words, where the field's own is None.
        choices: the values that are allowed.
        least: the smallest value that is allowed.
        most: the largest one.
        read: makes the value of the text that was given to the flag (of a repeatable
            flag: of the list of texts).
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
    """Return a dataclass field that is an option; `details` are those of `Option`."""
    return dataclasses.field(
        default=default, metadata={_KEY: Option(help=help, **details)}
    )


def option_of(field: "dataclasses.Field[Any]") -> Option:
    """Return what a field was declared with; nothing for a field that is no option."""
    found: Option = field.metadata.get(_KEY, Option())
    return found


def check_options(options: Any) -> None:
    """Raise OpenELMError if a field of a dataclass has a value that it may not have.

    Numbers are compared with the field's type and limits, texts with its choices.
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
    """Return each field's name, number type (None: no number) and declaration."""
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
    number: Any = value  # compared as it is: a float would round large integers
    if not least <= number <= most:
        low, high = (
            f"{x:g}" if isinstance(x, float) else str(x) for x in (least, most)
        )
        allowed = f"{low} or more" if declared.most is None else f"from {low} to {high}"
        raise OpenELMError(f"`{name}` is {value}; it must be {allowed}.")
