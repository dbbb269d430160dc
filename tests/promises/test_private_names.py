"""The project uses no private name of another package."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from places import ROOT

OURS = ("mlx_openelm", "converters")
PUBLIC = {"_exit"}  # os._exit is documented


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in PUBLIC


def foreign_private_names(source: str) -> Iterator[str]:
    """Yield private names that a module imports, or uses and does not define."""
    tree = ast.parse(source)
    defined = {*defined_names(tree), *names_of_own_imports(tree)}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for name in names:
                    yield from filter(is_private, name.name.split("."))
            case ast.ImportFrom(module=str(module), names=names):
                if module.partition(".")[0] not in OURS:
                    parts = [*module.split("."), *(name.name for name in names)]
                    yield from filter(is_private, parts)
            case ast.Attribute(attr=name) if is_private(name) and name not in defined:
                yield name
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ) if is_private(name) and name not in defined:
                yield name


def names_of_own_imports(tree: ast.Module) -> Iterator[str]:
    """Yield the names that the project's modules define which a module imports."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if module.startswith(OURS):
                file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
                if file.exists():
                    yield from names_of(file)


@cache
def names_of(file: Path) -> set[str]:
    return set(defined_names(ast.parse(file.read_text())))


def defined_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module defines: functions, classes, fields, variables."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(
                value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()
            ):
                yield name
            case ast.alias(name=str(name), asname=str(alias)):
                yield alias


def test_no_private_name_of_another_package_is_used():
    files = [file for package in OURS for file in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    found = {file: set(foreign_private_names(file.read_text())) for file in files}
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import _ctypes",
        "from mlx_lm import _server",
        "from mlx_lm._server import run",
        "from uvicorn import Server; Server(None)._serve(None)",
        "import mlx.core as mx; mx.array(1)._private",
        "getattr(object(), '_hidden')",
    ],
)
def test_a_private_name_is_noticed(line):
    assert set(foreign_private_names(line))


def test_own_private_names_and_public_ones_are_allowed():
    lines = "import os, sys; os._exit(1); sys.__stdout__; self._a = 1; other._a = 2"
    assert set(foreign_private_names(lines)) == set()
