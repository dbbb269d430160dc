"""Flags derived from the fields of a dataclass, and messages that name them."""

import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Annotated

import pytest
import typer
from commands import call
from typer.testing import CliRunner

from converters.conversion.options import ConversionOptions
from mlx_openelm.cli.derived_options import GivenOptions, OptionsOf, derive_options
from mlx_openelm.cli.flags import show_flags, use_flags_of
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.generation.options import Sampling
from mlx_openelm.options import option, option_of


@dataclass(frozen=True)
class Options:
    steps: int = option(3, "Steps, not {long_name}.", panel="Length")
    long_name: float | None = option(
        None, "A name.", flags=("-l", "--name"), shown_default="that of {steps}"
    )
    on: bool = option(True, "Turn it off.")
    off: bool = option(False, "Turn it on.")
    either: bool | None = option(None, "Either.", flags=("--either/--no-either",))
    words: tuple[str, ...] = option((), "Words.")
    read: int | str = option(16, "Read.", read=lambda text: f"<{text}>")
    zero: float = option(0.0, "Zero.")
    hidden: int = option(1)


def run(*arguments: str, declared: OptionsOf | None = None):
    app, given = typer.Typer(), {}

    @app.command()
    @derive_options
    def command(
        *,
        first: str = "x",
        options: Annotated[GivenOptions, declared or OptionsOf(Options)],
        last: bool = False,
    ) -> None:
        given.update(options, first=first, last=last)

    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    return result, given


def test_the_command_receives_only_the_options_given():
    result, given = run()
    assert result.exit_code == 0
    assert given == {"first": "x", "last": False}


def test_values_have_the_types_of_the_fields():
    _, given = run(
        *("--steps", "3", "-l", "0.5", "--no-on", "--off", "--no-either"),
        *("--words", "a b", "--words", "c", "--read", "q", "--zero", "0", "--last"),
    )
    assert given == {
        **{"first": "x", "last": True, "steps": 3, "long_name": 0.5, "on": False},
        **{"off": True, "either": False, "words": ("a b", "c"), "read": "<q>"},
        "zero": 0.0,
    }


def test_help_has_the_defaults_and_names_flags():
    text = run("--help")[0].output
    assert "Steps, not --name. [default: 3]" in text
    assert "[default: (that of --steps)]" in text
    assert "[default: 0.0]" in text
    assert "Length" in text
    assert "hidden" not in text
    assert "[default: off]" not in text


@pytest.mark.parametrize(
    ("declared", "flags"),
    [
        (OptionsOf(Options, only=("zero", "off")), {"off", "zero"}),
        (
            OptionsOf(Options, without=("zero", "steps", "words", "read")),
            {"long_name", "on", "off", "either"},
        ),
    ],
)
def test_a_command_takes_some_of_the_options(declared, flags):
    assert {field.name for field in declared.fields()} == flags
    accepted = run("--zero", "1", declared=declared)[0].exit_code == 0
    assert accepted == ("zero" in flags)


@pytest.mark.parametrize("kind", [FinetuneRecipe, Sampling, ConversionOptions])
def test_every_field_has_a_help_text_except_those_of_recipes_and_python(kind):
    undocumented = {f.name for f in fields(kind) if option_of(f).help is None}
    assert undocumented <= {
        *("final_learning_rate", "betas", "eps", "sample_tokens"),  # recipes
        *("apart", "base", "repack"),  # convert and fuse
    }


def test_a_message_of_the_library_shows_the_flags_of_the_command():
    app = typer.Typer()

    @app.command()
    def command(
        bits: Annotated[int, typer.Option("-b", "--q-bits")] = 4,
        hf_path: Annotated[str, typer.Option("--hf-path", "--model")] = "",
    ) -> None: ...

    use_flags_of(typer.main.get_command(app))
    assert show_flags("`bits` is 9; see `model` and `hf_path`, or `ls`, `other`.") == (
        "--q-bits is 9; see --model and --hf-path, or `ls`, `other`."
    )


def test_an_error_names_the_flag():
    assert "--q-bits is 99; MLX has" in call("convert", "demo", "--q-bits", "99").stderr
    assert "--top-p is 3.0; it must" in call("generate", "x", "--top-p", "3").stderr


def test_options_need_neither_mlx_nor_numpy_nor_yaml():
    code = (
        "import sys, mlx_openelm.cli.main\n"
        "print(sorted({'mlx.core', 'numpy', 'torch', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
