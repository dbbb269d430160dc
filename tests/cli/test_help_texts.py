"""What --help shows: whole texts, panels, defaults and examples."""

import re
import shlex

import pytest
import typer
from commands import call

from mlx_openelm.cli.help.examples import EXAMPLES
from mlx_openelm.cli.main import app


def list_commands(command, name=""):
    """Yield each command and subcommand with its name; "" is the program itself."""
    yield name, command
    for part, subcommand in getattr(command, "commands", {}).items():
        yield from list_commands(subcommand, f"{name} {part}".strip())


COMMANDS = dict(list_commands(typer.main.get_command(app)))
LINE = 76  # characters that fit into a terminal of 80


def show_help(name, monkeypatch, *, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    return call(*name.split(), "--help").stdout


def flatten(text):
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("name", COMMANDS)
def test_no_text_becomes_markup_or_emoji(name, monkeypatch):
    command = COMMANDS[name]
    texts = [command.help, command.epilog]
    texts += [getattr(parameter, "help", "") for parameter in command.params]
    for parameter in command.params:
        if isinstance(getattr(parameter, "show_default", None), str):
            texts.append(f"[default: {parameter.show_default}]")
    texts = [flatten(text) for text in texts if text]
    shown = flatten(show_help(name, monkeypatch, columns=1000))
    assert [text for text in texts if text not in shown] == []
    assert shown.isascii()
    assert not re.search(r"\{[a-z_]+\}", shown)  # the name of another option


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_in_panels_and_few_in_the_first(name):
    panels = {}
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option":
            panels.setdefault(parameter.rich_help_panel, []).append(parameter.name)
    assert len(panels.get(None, [])) <= 5  # those that most people need, and --offline
    for options in panels.values():
        assert not {"as_json", "quiet"} & {*options} or options is panels["Output"]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_text_is_a_fragment_that_stands_alone(name):
    for parameter in COMMANDS[name].params:
        text = getattr(parameter, "help", None) or ""
        assert re.fullmatch(r"[A-Zd].*\.", text), (parameter.name, text)
        assert not text.startswith("Of "), text
        assert not re.search(r"\b[Dd]efault\b", text), text


def test_a_default_in_words_is_shown_as_any_other(monkeypatch):
    shown = flatten(show_help("lora", monkeypatch, columns=200))
    assert "[default: 3, without --iters]" in shown
    assert "[default: adapters/<data name>]" in shown
    assert "[default: 16]" in shown
    assert "[default: (" not in shown


def test_switches_show_no_type(monkeypatch):
    assert all(
        "<bool>" not in show_help(name, monkeypatch, columns=200) for name in COMMANDS
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_end_the_help_each_on_its_line(name, monkeypatch):
    lines = [
        line.strip()
        for line in show_help(name, monkeypatch, columns=80).splitlines()
        if line.strip()
    ]
    examples = EXAMPLES[name]
    assert lines[-1 - len(examples) :] == ["Examples:", *examples]
    assert all(len(example) <= LINE for example in examples)


@pytest.mark.parametrize("example", sorted({*sum(EXAMPLES.values(), ())}))
def test_an_example_is_a_command_that_can_be_parsed(example):
    program, *words = shlex.split(example.partition(" > ")[0])
    assert program == "mlx-openelm"
    command, name = COMMANDS[""], ""
    while words and (inner := f"{name} {words[0]}".strip()) in COMMANDS:
        command, name = COMMANDS[inner], inner
        del words[0]
    command.make_context(name, words)  # raises on a wrong option or value


def test_every_command_has_its_examples():
    assert EXAMPLES.keys() == COMMANDS.keys()
    several = {name for name, examples in EXAMPLES.items() if len(examples) in (2, 3)}
    assert COMMANDS.keys() - several == {"recipes list", "recipes show"}
