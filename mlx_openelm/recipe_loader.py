"""Loading of recipes: YAML and flags combined into a validated dataclass."""

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import read_text
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.message_parts import describe_error
from mlx_openelm.paths import user_path

Recipe = TypeVar("Recipe")


def load_recipe(kind: type[Recipe], name: str, overrides: Mapping[str, Any]) -> Recipe:
    """Read a recipe by file path or bundled name; flags override the file.

    Args:
        kind: the recipe's dataclass; `REMOVED_KEYS` of it or of a group has the
            explanations of keys that are refused.
        overrides: values by dotted key ("data.train"); None means "not given".

    Raises:
        OpenELMError: no such recipe, an unknown key (a similar key is suggested), or a
            value of a wrong type.
    """
    path = find_recipe(name)
    entries = read_mapping(path)
    for key, value in overrides.items():
        if value is None:
            continue
        group, _, leaf = key.rpartition(".")
        target = entries
        if group:  # YAML reads an empty group as None
            target = entries[group] = entries.get(group) or {}
        if isinstance(target, dict):  # else `_build` raises the error
            target[leaf] = value
    recipe: Recipe = _build(kind, entries, str(path), "")
    return recipe


def make_recipe(kind: type[Recipe], values: Mapping[str, Any], where: str) -> Recipe:
    """Make a recipe from flags only; None means "not given". Errors as `load_recipe`.

    Args:
        where: the source of the values, for errors.
    """
    entries = {key: value for key, value in values.items() if value is not None}
    recipe: Recipe = _build(kind, entries, where, "")
    return recipe


def find_recipe(name: str) -> Path:
    """Return the path of a recipe file, or of the bundled recipe of that name."""
    path = user_path(name)
    if path.is_file():
        return path
    known = bundled_recipes()
    if name in known:
        return known[name]
    raise OpenELMError(
        f"No recipe file {name!r}, and no bundled recipe of that name"
        f"{_suggest_recipe(name, known)}; `mlx-openelm recipes` lists them."
    )


def read_recipe(name: str) -> str:
    """Return the text of a recipe, by file path or bundled name.

    Raises:
        OpenELMError: no such recipe, or it is not UTF-8.
    """
    path = find_recipe(name)
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise OpenELMError(
            f"Cannot read the recipe {path}: {describe_error(error)}."
        ) from error


def bundled_recipes() -> dict[str, Path]:
    """Return the paths of the bundled recipes, by name ("pretrain/stories")."""
    package = Path(__file__).parent
    for root in (package / "recipes", package.parent / "recipes"):
        if root.is_dir():
            return {
                str(path.relative_to(root).with_suffix("")): path
                for path in sorted(root.rglob("*.yaml"))
            }
    return {}


def _build(kind: Any, entries: Mapping[str, Any], where: str, prefix: str) -> Any:
    types_of = typing.get_type_hints(kind, include_extras=True)
    hints = {field.name: types_of[field.name] for field in dataclasses.fields(kind)}
    unknown = [key for key in entries if key not in hints]
    for key, reason in getattr(kind, "REMOVED_KEYS", {}).items():
        if key in entries:
            raise OpenELMError(f"{where}: {prefix}{key} is no longer a key: {reason}.")
    if unknown:
        raise OpenELMError(
            f"{where}: unknown key {prefix}{unknown[0]}"
            f"{_suggest(str(unknown[0]), hints)}; the keys are {', '.join(hints)}."
        )
    values = {
        key: _convert(hints[key], value, where, f"{prefix}{key}")
        for key, value in entries.items()
    }
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise OpenELMError(f"{where}: {prefix}{missing[0]} is missing.")
    return kind(**values)


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise OpenELMError(
                f"{where}: {key} is {_show(value)}, expected a group of keys."
            )
        return _build(hint, value, where, f"{key}.")
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        inner, expand = typing.get_args(hint)  # of a PathText
        return expand(_convert(inner, value, where, key))
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        for option in options:
            try:
                return _convert(option, value, where, key)
            except OpenELMError:
                continue
    elif origin is tuple:
        items = [value] if isinstance(value, str) else value
        kinds = typing.get_args(hint)
        if isinstance(items, list | tuple) and (
            kinds[-1] is ... or len(kinds) == len(items)
        ):
            return tuple(_convert(kinds[0], item, where, key) for item in items)
    elif hint is types.NoneType and value is None:
        return None
    elif hint is float and isinstance(value, int | float | str):
        try:  # YAML reads "5e-3" as a string
            if not isinstance(value, bool):
                return float(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise OpenELMError(
        f"{where}: {key} is {_show(value)}, expected {_type_name(hint)}."
    )


def _show(value: Any) -> str:
    shown = reprlib.Repr()  # YAML can repeat a list a billion times
    shown.maxlevel, shown.maxstring, shown.maxother = 2, 200, 200
    return shown.repr(value)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(map(_type_name, typing.get_args(hint)))
    if hint is types.NoneType:
        return "null"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _suggest(word: str, hints: Mapping[str, Any]) -> str:
    """Suggest the group that has a key, or else a similar key."""
    for name, hint in hints.items():
        fields = dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ()
        if word in {field.name for field in fields}:
            return f" (did you mean {name}.{word}?)"
    return _did_you_mean(word, hints)


def _suggest_recipe(name: str, known: typing.Iterable[str]) -> str:
    """Suggest the recipes of all sizes, or else one with a similar name."""
    sizes = [recipe for recipe in known if recipe.startswith(f"{name}-")]
    if sizes:
        return f" (did you mean {', '.join(sizes)}?)"
    return _did_you_mean(name, known)


def _did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
