"""Recipes: errors are named, flags override, and the bundled recipes are valid."""

from dataclasses import dataclass
from importlib.util import find_spec

import pytest
from commands import expect_error

from converters.pretraining.recipe import PretrainRecipe
from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.recipe_loader import bundled_recipes, load_recipe

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="needs PyTorch")


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: Inner
    steps: int
    seed: int | None = 7
    fast: bool = False
    several: float | tuple[float, ...] = 1.0


def load(folder, text, **overrides):
    (folder / "own.yaml").write_text(text)
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_recipe(Outer, str(folder / "own.yaml"), dotted)


def test_values_are_converted_to_the_declared_types(tmp_path):
    recipe = load(
        tmp_path,
        "{inner: {rate: 5e-3, betas: [1, 2], files: a.txt}, steps: 3, seed: null,"
        " fast: true, several: [1, 2.5]}",
    )
    inner = Inner(5e-3, (1.0, 2.0), ("a.txt",))
    assert recipe == Outer(inner, 3, None, True, (1.0, 2.5))
    assert load(tmp_path, "{inner: {}, steps: 3}") == Outer(Inner(), 3)


def test_the_type_of_a_path_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: a.jsonl\nteacher: 5")
    with pytest.raises(OpenELMError, match="teacher is 5, expected str or null"):
        load_recipe(FinetuneRecipe, str(tmp_path / "recipe.yaml"), {})


def test_flags_override_the_file_unless_they_are_none(tmp_path):
    flags = {"inner__rate": 2.0, "inner__files": ["b", "c"], "steps": None, "seed": 0}
    recipe = load(tmp_path, "{inner: {rate: 1, files: a}, steps: 3, seed: 5}", **flags)
    assert recipe == Outer(Inner(2.0, files=("b", "c")), 3, 0)
    for text in ("steps: 3", "{steps: 3, inner: }"):
        assert load(tmp_path, text, inner__rate=2.0) == Outer(Inner(2.0), 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{inner: {}, steps: true}", "steps is True, expected int"),
        ("{inner: {}, steps: 1.5}", "steps is 1.5, expected int"),
        ("{inner: {rate: true}, steps: 1}", "inner.rate is True, expected float"),
        ("{inner: {rate: fast}, steps: 1}", "inner.rate is 'fast'"),
        ("{inner: {betas: [1]}, steps: 1}", "inner.betas is"),
        ("{inner: {files: [1]}, steps: 1}", "inner.files is 1, expected str"),
        ("{inner: {}, steps: 1, fast: 1}", "fast is 1, expected bool"),
        ("{inner: {}, steps: 1, several: [a]}", "several is"),
        ("{inner: {}, steps: 1, 5: 1}", "unknown key 5"),
        ("{inner: [], steps: 1}", "inner is [], expected a group"),
    ],
)
def test_a_value_of_a_wrong_type_is_reported(tmp_path, text, message):
    with pytest.raises(OpenELMError) as error:
        load(tmp_path, text)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["inner: 5", "inner: [1]"])
def test_a_flag_for_a_key_that_is_not_a_group_is_an_error(tmp_path, text):
    with pytest.raises(OpenELMError, match=r"inner is .*expected a group"):
        load(tmp_path, text + "\nsteps: 1", inner__rate=2.0)


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_bundled_recipes_are_valid(name):
    if name.startswith("lora/"):
        lora = load_recipe(FinetuneRecipe, name, {})
        assert load_recipe(FinetuneRecipe, name, {"seed": 7}).seed == 7
        assert lora.step_size > 1
        return
    assert name.startswith("pretrain/")
    recipe = load_recipe(PretrainRecipe, name, {})
    if recipe.model.name or recipe.model.num_layers:  # else --init has them
        assert recipe.model.build(4096).num_parameters > 0


@needs_torch
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No recipe file 'own.yaml'"),
        ("stepz: 3", "unknown key stepz (did you mean steps?)"),
        ("model: {head_dims: 64}", "unknown key model.head_dims (did you mean"),
        ("steps: many", "steps is 'many', expected int"),
        ("{model: {}, data: {}, steps: 0}", "steps is 0"),
        ("{model: {}, data: {}, seed: -1}", "seed is -1"),
        ("model: 270M", "model is '270M', expected a group"),
        ("- 1", "own.yaml holds a list"),
        ("a: [", "own.yaml cannot be parsed"),
        ("{model: {name: 270M}, data: {}}", "has no text"),
    ],
)
def test_errors_in_a_recipe_are_reported(here, content, message):
    if content is not None:
        (here / "own.yaml").write_text(content)
    expect_error(here, "pretrain", "--quiet", "-c", "own.yaml", message=message)


def test_a_run_is_neither_overwritten_nor_resumed_from_nothing(here):
    pytest.importorskip("torch", reason="pretrain needs PyTorch")
    (here / "text.txt").write_text("A king had three daughters.")
    (here / "run").mkdir()
    (here / "run" / "metrics.jsonl").write_text("{}\n")
    start = ("pretrain", "--quiet", "-c", "pretrain/stories", "--data", "*.txt")
    message = ["run already holds metrics.jsonl", "another --output"]
    expect_error(here, *start, "--output", "run", message=message)
    (here / "run" / "recipe.json").write_text("{}\n")
    message = ["run already holds a run", "--resume"]
    expect_error(here, *start, "--output", "run", message=message)
    message = ["nothing to resume", "training_checkpoint_last.pt"]
    expect_error(here, *start, "--output", "other", "--resume", message=message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["show", "pretrain/storys"], "did you mean pretrain/stories?"),
        (["show", "model"], "No recipe file 'model'"),
        (["show", "model/model.safetensors"], "Cannot read"),
        (["copy", "pretrain/stories", "model/config.json"], "exists already"),
        (["copy", "pretrain/stories", "no/such/folder.yaml"], "Cannot write"),
        (["copy", "nothing"], "No recipe file 'nothing'"),
    ],
)
def test_recipes_that_cannot_be_shown_or_copied_are_reported(here, args, message):
    expect_error(here, "recipes", *args, message=message)
