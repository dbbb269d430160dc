"""Runs the examples of README.md and docs/, and compares or rewrites their output.

    python docs/run_examples.py [--update] [PAGE...]

Two kinds of fenced blocks are executed, page by page and in order, in an empty folder:

- A block with a file name as its title (```json title="tales.json") is written to that
  file.
- A block ```console has commands and their output. A line that starts with "$ " is a
  command for bash, continued by the lines after it that start with "> ". The lines that
  follow are its output, stdout and stderr together. The exit code has to be 0, unless a
  line of the output starts with "error:".

Outputs are compared line by line, with these exceptions:

- Runs of spaces, rules and trailing spaces do not matter.
- Numbers of time, speed and memory ("3.6 s", "81/s", "29 MB", `"prompt_tps": 27.5`) are
  equal to any other. Other numbers with a decimal point are equal within 2 % or
  0.001.
- In a block with the title "Figures vary" all numbers are equal.
- Lines about the machine (system, python, device ...) are not compared.

The checkout's folder is left out of paths. Commands run offline, without the caches and
settings of the user. `--update` writes outputs that differ into the pages, and the
sections of `write_options`.
"""

import argparse
import contextlib
import difflib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from write_options import update_options

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
FIGURES_VARY = "Figures vary"

_FENCE = re.compile(r'```(?P<kind>\w*)(?: title="(?P<title>[^"]*)")?\s*$')
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*[A-Za-z])"
)
_UNITS = r"(?:[kMG]i?B|bytes|ms|s|min|h|tokens/s)"
_MEASURED = (
    re.compile(r"\d[\d,.]*(?=/s\b)"),
    re.compile(rf"\d[\d,.]*(?= {_UNITS}\b)"),
    re.compile(r'(?<=_tps": )[\d.e-]+|(?<=_s": )[\d.e-]+'),
    re.compile(r'(?<=seconds": )[\d.e-]+|(?<=_bytes": )\d+'),
)
_MACHINE = re.compile(
    r"\s*(system|python|device|blas|mlx|mlx-openelm|memory_bytes|machine|computed with|"
    r"memory bandwidth)  |A share above 100 %"
)


@dataclass(frozen=True, slots=True)
class Example:
    """A command of a page, and the lines of its output.

    Attributes:
        first, last: lines of the output in the page, counted from 0, `last` excluded.
        figures_vary: all numbers of the output are equal to others.
    """

    command: str
    first: int
    last: int
    figures_vary: bool


@dataclass(frozen=True, slots=True)
class ExampleFile:
    """A file that a page shows."""

    name: str
    text: str


def pages() -> list[Path]:
    """Return the pages with examples."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def read_examples(lines: Sequence[str]) -> Iterator[Example | ExampleFile]:
    """Yield what is executed of a page."""
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        number += 1
        if not fence:
            continue
        end = lines.index("```", number)
        if fence["kind"] == "console":
            vary = fence["title"] == FIGURES_VARY
            yield from _read_commands(lines, number, end, vary)
        elif fence["title"]:
            yield ExampleFile(fence["title"], "\n".join([*lines[number:end], ""]))
        number = end + 1


def _read_commands(
    lines: Sequence[str], number: int, end: int, figures_vary: bool
) -> Iterator[Example]:
    while number < end:
        if not lines[number].startswith("$ "):
            raise SystemExit(f"A console block has to start with '$ ': {lines[number]}")
        command = [lines[number][2:]]
        number += 1
        while number < end and lines[number].startswith("> "):
            command.append(lines[number][2:])
            number += 1
        first = number
        while number < end and not lines[number].startswith("$ "):
            number += 1
        yield Example("\n".join(command), first, number, figures_vary)


class Shell:
    """Runs commands in a new folder, with the program of this checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "examples"
        self._groups: list[int] = []
        programs = folder / "bin"
        for new in (self.folder, programs):
            new.mkdir()
        (programs / "start.py").write_text(
            "import sys\nfrom mlx_openelm.__main__ import run\n"
            "sys.argv[0] = 'mlx-openelm'\nrun()\n"
        )
        python = shlex.quote(sys.executable)
        for name, start in (("mlx-openelm", programs / "start.py"), ("python", "")):
            program = programs / name
            start = shlex.quote(str(start)) if start else ""
            program.write_text(f'#!/bin/sh\nexec {python} {start} "$@"\n')
            program.chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MLX_OPENELM")}
        self._environment = kept | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "88",
            "NO_COLOR": "1",
            "TERM": "dumb",
        }

    def run(self, command: str) -> tuple[list[str], int]:
        """Run a command; return the lines of its output, and its exit code."""
        started = subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._groups.append(started.pid)
        output, _ = started.communicate()
        for path in (self.folder, ROOT):
            output = output.replace(f"{path}{os.sep}", "")
        lines = [line.rstrip() for line in output.splitlines()]
        while lines and not lines[-1]:
            lines.pop()
        return lines, started.returncode

    def close(self) -> None:
        """End what a command left running in the background."""
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGTERM)


def run_page(page: Path, *, update: bool = False) -> list[str]:
    """Run the examples of a page; return the differences and failures.

    With `update`, differing outputs are written into the page, and are no differences.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    problems: list[str] = []
    outputs: list[tuple[Example, list[str]]] = []
    with tempfile.TemporaryDirectory() as folder:
        shell = Shell(Path(folder).resolve())
        try:
            for example in read_examples(lines):
                if isinstance(example, ExampleFile):
                    (shell.folder / example.name).write_text(example.text)
                    continue
                output, code = shell.run(example.command)
                if code and not any(line.startswith("error:") for line in output):
                    problems.append(
                        f"{page.name}:{example.first}: exit code {code} of "
                        f"{example.command}\n" + "\n".join(output)
                    )
                elif not equal(
                    lines[example.first : example.last],
                    output,
                    figures_vary=example.figures_vary,
                ):
                    outputs.append((example, output))
        finally:
            shell.close()
    if update:
        for example, output in reversed(outputs):
            blank = example.last < len(lines) and lines[example.last].startswith("$ ")
            lines[example.first : example.last] = output + [""] * blank
        if outputs:
            page.write_text("\n".join([*lines, ""]), encoding="utf-8")
        return problems
    for example, output in outputs:
        expected = lines[example.first : example.last]
        difference = difflib.unified_diff(expected, output, "page", "now", lineterm="")
        problems.append(
            f"{page.name}:{example.first}: {example.command}\n" + "\n".join(difference)
        )
    return problems


def equal(
    expected: Sequence[str], actual: Sequence[str], *, figures_vary: bool
) -> bool:
    """Return whether two outputs are equal by the rules above."""
    texts, numbers = [], []
    for lines in (expected, actual):
        kept = "\n".join(line for line in lines if not _MACHINE.match(line))
        for measured in _MEASURED:
            kept = measured.sub("#", kept)
        kept = re.sub(r"[ \t─━]+", " ", kept)
        kept = re.sub(r" ?\n ?", "\n", kept).strip()
        texts.append(_NUMBER.sub("0", kept))
        numbers.append(_NUMBER.findall(kept))
    if texts[0] != texts[1] or len(numbers[0]) != len(numbers[1]):
        return False
    return figures_vary or all(map(_equal_numbers, *numbers))


def _equal_numbers(first: str, second: str) -> bool:
    if "." not in first or "." not in second:
        return first == second
    a, b = (float(number.replace(",", "")) for number in (first, second))
    return abs(a - b) <= max(0.001, 0.02 * max(abs(a), abs(b)))


def main() -> None:
    """Run the pages that the command line names, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    parser.add_argument("--update", action="store_true", help="rewrite the outputs")
    args = parser.parse_args()
    if args.update:
        update_options()
    failed = False
    for page in args.pages or pages():
        for problem in run_page(page.resolve(), update=args.update):
            failed = True
            print(problem, end="\n\n", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
