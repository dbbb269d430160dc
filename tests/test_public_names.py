"""The names of the Python API."""

import importlib

import pytest

import mlx_openelm

NAMES = [
    "Context",
    "FinetuneRecipe",
    "LookupDrafter",
    "ModelDrafter",
    "OpenELMConfig",
    "OpenELMError",
    "Sampling",
    "convert",
    "evaluate",
    "finetune",
    "generate",
    "load",
    "stream",
]


def test_the_public_names_are_these():
    assert mlx_openelm.__all__ == NAMES
    assert dir(mlx_openelm) == sorted([*NAMES, "__version__"])


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_the_object_that_its_module_defines(name):
    public = getattr(mlx_openelm, name)
    assert callable(public)
    assert public.__name__ == name
    assert getattr(importlib.import_module(public.__module__), name) is public


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mlx_openelm.nonsense  # noqa: B018
