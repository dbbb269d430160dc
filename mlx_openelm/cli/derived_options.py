"""Flags of a command, derived from the fields of an options dataclass."""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any

import typer

from mlx_openelm.options import Option, option_of

GivenOptions = dict[str, Any]  # by field name; only the options given


@dataclass(frozen=True, slots=True)
class OptionsOf:
    """Annotation of a command's parameter: one flag for each field of `kind`.

    Attributes:
        only: if not empty, the only fields that become flags.
        without: fields that do not become flags.
    """

    kind: type
    only: Sequence[str] = ()
    without: Sequence[str] = ()

    def fields(self) -> "Iterator[dataclasses.Field[Any]]":
        """Yield the fields that become flags; inherited ones follow the kind's own."""
        own = vars(self.kind).get("__annotations__", {})
        ordered = sorted(dataclasses.fields(self.kind), key=lambda f: f.name not in own)
        for field in ordered:
            if option_of(field).help is None or field.name in self.without:
                continue
            if not self.only or field.name in self.only:
                yield field


def derive_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with flags in place of its `OptionsOf` parameters.

    Each such parameter receives a dictionary of only the options that were given, so
    that a recipe or the model can provide the others.
    """
    parameters = [
        inspect.Parameter(
            "context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context
        )
    ]
    groups: dict[str, OptionsOf] = {}
    for parameter in inspect.signature(command).parameters.values():
        declared = _options_of(parameter.annotation)
        if declared is None:
            parameters.append(parameter)
            continue
        groups[parameter.name] = declared
        flags = _Flags(
            {f.name: _flags(f.name, option_of(f))[-1] for f in declared.fields()}
        )
        hints = typing.get_type_hints(declared.kind)
        parameters += [
            _derive(field, hints[field.name], flags) for field in declared.fields()
        ]

    @functools.wraps(command)
    def run(context: typer.Context, **values: Any) -> None:
        for name, declared in groups.items():
            values[name] = {}
            for field in declared.fields():
                value = values.pop(field.name)
                source = context.get_parameter_source(field.name)
                if source is not None and source.name != "DEFAULT":
                    values[name][field.name] = _read(field, value)
        command(**values)

    setattr(run, "__signature__", inspect.Signature(parameters))  # noqa: B010 - mypy
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


class _Flags(dict[str, str]):
    """The flag of each option by name; for an unknown name, its usual spelling."""

    def __missing__(self, name: str) -> str:
        return _spell(name)


def _options_of(annotation: Any) -> OptionsOf | None:
    for extra in getattr(annotation, "__metadata__", ()):
        if isinstance(extra, OptionsOf):
            return extra
    return None


def _derive(
    field: "dataclasses.Field[Any]", hint: Any, flags: Mapping[str, str]
) -> inspect.Parameter:
    declared = option_of(field)
    assert declared.help is not None
    kind = _flag_type(hint, declared)
    default = None if field.default in (MISSING, ()) else field.default
    if kind is bool and default is not None:
        default = False  # the flag turns off what is on by default
    shown = declared.shown_default or ""
    shown = shown.format_map(_Flags({**flags, "default": str(field.default)}))
    info = typer.Option(
        *_flags(field.name, declared, default_on=field.default is True),
        help=declared.help.format_map(flags),
        rich_help_panel=declared.panel,
        show_default=shown or (default is not False and default not in (None, "")),
        metavar="|".join(declared.choices) or None,
    )
    optional = kind | None if default is None else kind
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[optional, info],
    )


def _flag_type(hint: Any, declared: Option) -> Any:
    """Return the type that Typer converts the flag's value to."""
    if isinstance(hint, types.UnionType):
        hint = next(h for h in typing.get_args(hint) if h is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return list[str]
    return str if declared.read is not None else hint


def _read(field: "dataclasses.Field[Any]", value: Any) -> Any:
    declared = option_of(field)
    if field.default is True:
        return not value
    if declared.read is not None:
        return declared.read(value)
    return tuple(value) if isinstance(value, list) else value


def _flags(name: str, declared: Option, *, default_on: bool = False) -> tuple[str, ...]:
    if declared.flags:
        return declared.flags
    return (_spell(f"no_{name}" if default_on else name),)


def _spell(name: str) -> str:
    return f"--{name.replace('_', '-')}"
