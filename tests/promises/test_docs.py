"""The pages of docs/: examples, links, paths and options."""

import re
from pathlib import Path

import pytest
from commands import call
from places import ROOT
from run_examples import ExampleFile, equal, pages, read_examples, run_page
from write_options import COMMANDS, END, START, commands, options_section

NAMES = [page.relative_to(ROOT).as_posix() for page in pages()]
EXECUTED = [
    name
    for name, page in zip(NAMES, pages(), strict=True)
    if any(read_examples(page.read_text(encoding="utf-8").splitlines()))
]
_NEEDS = {"convert": "gguf"} | dict.fromkeys(
    ("grow", "parity", "pretrain", "reading-tour"), "torch"
)


@pytest.mark.proof
@pytest.mark.parametrize("name", EXECUTED)
def test_examples_print_the_output_on_the_page(name):
    pytest.importorskip(_NEEDS.get(Path(name).stem, "mlx"))
    problems = run_page(ROOT / name)
    how = "python docs/run_examples.py --update"
    assert not problems, "\n\n".join([*problems, f"If this is intended: {how} {name}"])


@pytest.mark.parametrize(
    ("shown", "printed", "figures_vary", "same"),
    [
        ("took 3.6 s at 81/s", "took 12 s at 7.5/s", False, True),
        ('{"prompt_tps": 27.48, "a": 1}', '{"prompt_tps": 9, "a": 1}', False, True),
        ("loss 5.298 of 7", "loss 5.301 of 7", False, True),
        ("loss 5.298 of 7", "loss 5.498 of 7", False, False),
        ("loss 5.298 of 7", "loss 5.298 of 8", False, False),
        ("loss 5.298 of 7", "gain 5.298 of 7", False, False),
        ("logits  3.1e-05  ok", "logits 9.9e-06 ok", False, True),
        ("demo  77 tokens", "demo  912 tokens", True, True),
        ("demo  77 tokens", "demo  77 bytes", True, False),
        ("device  CPU (AMD)\nok", "device  GPU\nok", False, True),
    ],
)
def test_outputs_are_compared_by_the_documented_rules(
    shown, printed, figures_vary, same
):
    result = equal(shown.splitlines(), printed.splitlines(), figures_vary=figures_vary)
    assert result is same


def test_a_page_is_executed_and_updated(tmp_path):
    page = tmp_path / "page.md"
    lines = [
        *('```text title="names.txt"', "Anna", "Bert", "```"),
        *("```console", "$ cat names.txt \\", "> | sort -r", "Bert"),
        *("$ echo 1 && false", "```"),
    ]
    page.write_text("\n".join(lines))
    file, first, _ = read_examples(lines)
    assert file == ExampleFile("names.txt", "Anna\nBert\n")
    assert first.command == "cat names.txt \\\n| sort -r"
    failed, differs = run_page(page)
    assert "exit code 1" in failed
    assert "+Anna" in differs
    assert run_page(page, update=True) == [failed]
    assert page.read_text().splitlines()[7:9] == ["Bert", "Anna"]


def test_every_command_has_a_page_and_every_page_a_command():
    assert {page.stem for page in COMMANDS.glob("*.md")} == set(commands())


@pytest.mark.parametrize("name", commands())
def test_a_page_has_the_options_of_its_command(name, monkeypatch):
    page = (COMMANDS / f"{name}.md").read_text(encoding="utf-8")
    section = page.partition(f"{START}\n\n")[2].partition(f"\n{END}")[0]
    assert section == options_section(name), "python docs/write_options.py rewrites it"
    monkeypatch.setenv("COLUMNS", "200")
    for path in (name, *(f"{name} {part}" for part in subcommands(name))):
        printed = call(*path.split(), "--help").stdout.splitlines()
        shown = "\n".join(line for line in printed if line.startswith("│"))
        flags = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown)) - {"-h", "--help"}
        assert flags <= set(re.findall(r"--?[a-z][\w-]*", section)), path


def subcommands(name):
    return getattr(commands()[name], "commands", {})


@pytest.mark.parametrize("name", NAMES)
def test_links_and_paths_of_a_page_exist(name):
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target
    folders = "mlx_openelm|converters|recipes|benchmarks|tests|docs"
    for path in re.findall(rf"`(?:python )?((?:{folders})/[\w/.-]+)", prose):
        assert (ROOT / path).exists(), path


def anchors(text):
    """Return the anchors that MkDocs gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {
        re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
        for heading in headings
    }
