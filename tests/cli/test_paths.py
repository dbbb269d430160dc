"""The home folder: "~" is expanded in every path, and in no text."""

import json
from pathlib import Path

import pytest
import typer
from commands import call

from converters.pretraining.recipe import PretrainRecipe
from mlx_openelm.cli.help.commands import TEXTS
from mlx_openelm.cli.main import app
from mlx_openelm.evaluation.texts import evaluate
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.paths import user_path
from mlx_openelm.recipe_loader import load_recipe, make_recipe

COMMANDS = typer.main.get_command(app).commands
STRINGS = (str, Path, list[str], list[Path])


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder, here = tmp_path / "home", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(here)
    yield folder
    assert not list(here.iterdir())  # no folder named "~"


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "recipes"])
def test_every_option_that_can_be_a_path_is_expanded(home, name):
    command, texts, paths, numbers = COMMANDS[name], [], [], []
    for parameter in command.params:
        if parameter.type_descriptor.annotation in STRINGS:
            (texts if parameter.name in TEXTS else paths).append(parameter)
        elif parameter.required:
            numbers += [parameter.opts[0], "2"]
    arguments = ["~/a" for p in paths if p.param_type_name == "argument"]
    for parameter in (*texts, *paths):
        if parameter.param_type_name == "option":
            arguments += [parameter.opts[0], "~/a"]
    context = command.make_context(name, [*arguments, *numbers])
    for parameter in paths:
        value = context.params[parameter.name]
        for part in value if isinstance(value, list | tuple) else [value]:
            assert str(part) == f"{home}/a", parameter.name
    for parameter in texts:
        if parameter.param_type_name == "option":
            value = context.params[parameter.name]
            assert value in ("~/a", ["~/a"], ("~/a",)), parameter.name


def test_recipes_are_copied_and_read_from_the_home(home):
    ran = call("recipes", "copy", "lora/oz", "~/own.yaml")
    assert (ran.exit_code, ran.stdout) == (0, f"{home}/own.yaml\n")
    assert (
        call("recipes", "show", "~/own.yaml").stdout == (home / "own.yaml").read_text()
    )


def test_values_of_recipes_are_expanded(home):
    (home / "r.yaml").write_text(
        "output: ~/run\ninit: ~/w.pt\ntokenizer: {path: ~/t.model}\n"
        "data: {train: [~/a/*.txt, b.txt], heldout: ~/h.txt, exclude: ~/x, cache: ~/c}"
    )
    recipe = load_recipe(PretrainRecipe, "~/r.yaml", {})
    assert (recipe.output, recipe.init) == (f"{home}/run", f"{home}/w.pt")
    assert recipe.tokenizer.path == f"{home}/t.model"
    assert recipe.data.train == (f"{home}/a/*.txt", "b.txt")
    assert recipe.data.heldout == (f"{home}/h.txt",)
    assert (recipe.data.exclude, recipe.data.cache) == ((f"{home}/x",), f"{home}/c")
    corpora = {"data.corpora": [{"files": "~/d/*.gz"}]}
    (corpus,) = load_recipe(
        PretrainRecipe, "~/r.yaml", {**corpora, "data.train": []}
    ).data.corpora
    assert corpus.files == (f"{home}/d/*.gz",)
    given = {"data": "~/d.jsonl", "adapter_path": "~/a", "model": "~/m"}
    tuned = make_recipe(FinetuneRecipe, given, "the options")
    assert (tuned.data, tuned.model) == (f"{home}/d.jsonl", f"{home}/m")
    assert tuned.adapter_path == f"{home}/a"


def test_python_and_the_command_line_read_the_same_file(home):
    import mlx_openelm

    (home / "t.txt").write_text("Once upon a time there was a king.")
    ran = call("evaluate", "--text=~/t.txt", "--json", "--quiet")
    assert ran.exit_code == 0, ran.stderr
    score = evaluate(*mlx_openelm.load("demo"), text="~/t.txt")
    assert json.loads(ran.stdout)["tokens"] == score.tokens


def test_the_home_of_an_unknown_user_stays_as_it_is():
    assert user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert user_path("a~/~") == Path("a~/~")


def test_the_home_of_a_user_without_a_folder_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: f"/nonexistent{path}")
    assert user_path("~nobody/x") == Path("~nobody/x")
