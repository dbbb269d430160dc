"""Check that two checkouts of this project behave the same, byte for byte.

    python benchmarks/compare_checkouts.py OLD NEW [--quick] [--only REGEX] [--rounds 7]

Each side runs `PYTHONPATH=<checkout> python -m mlx_openelm ...` in an empty folder.
The scenarios (checkout_scenarios.py) compare all files that a command writes, and its
output. The resume scenarios stop a command under OLD, repeat it under NEW, and compare
the result with that of an uninterrupted run under OLD. The built packages are compared
by their data files. At the end the start-up times of both are printed. The exit status
is 1 if anything differs.

Only these are excluded from the comparison:

- the path of the checkout, which is replaced by a placeholder;
- the numbers of the JSON keys in `VARYING` (checkout_side.py): times,
  speeds and measured memory;
- in report.html all numbers and repeated lines (the axes of speed); in resumed runs the
  whole file, which reports the interruption;
- in metrics.jsonl of resumed runs the events in `INTERRUPTION`;
- in training_checkpoint_last.pt of resumed runs the pickle encoding, not its values;
- in packages what `read_data_files` excludes.
"""

import argparse
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from checkout_scenarios import CHECKS, Resume, Scenario
from checkout_side import (
    TIMEOUT_S,
    CheckError,
    Files,
    Side,
    ended,
    last_line,
    split_safetensors,
)

MOST_SHOWN = 5  # differences of one check

INTERRUPTION = re.compile(  # a kill may come between a save and its line
    rb'\{"event": "(?:save|saved|note|resume|started)".*\n'
    rb'|\{"event": "end".*"reason": "interrupted".*\n'
)
# Scenarios -------------------------------------------------------------------------


def run_check(check: Scenario | Resume, old: Side, new: Side) -> tuple[Files, Files]:
    """Return the expected and the actual results."""
    if isinstance(check, Scenario):
        return run_scenario(check, old), run_scenario(check, new)
    return run_resume(check, old, new)


def run_scenario(scenario: Scenario, side: Side) -> Files:
    side = side.inside(scenario.name)
    stream = "stderr" if scenario.status else "stdout"
    printed = {
        f"{stream} of {command!r}": side.normalise(
            "stdout", side.run(command, scenario.status)
        )
        for command in scenario.commands
    }
    return side.read_results() | printed


def run_resume(resume: Resume, old: Side, new: Side) -> tuple[Files, Files]:
    whole = prepare_resume(resume, old)
    whole.run(resume.command)
    expected = read_resumed(whole, resume.ignored)
    stopped = prepare_resume(resume, old)
    stopped.stop(resume.command, resume.ready, resume.by)
    kept = read_marks(stopped.folder, resume.kept) if resume.kept else set()
    resumed = replace(new, folder=stopped.folder)
    resumed.run(f"{resume.command} {resume.flag}")
    if resume.kept and not kept <= read_marks(stopped.folder, resume.kept):
        raise CheckError(f"NEW started again instead of resuming from {resume.kept}")
    return expected, read_resumed(resumed, resume.ignored)


def prepare_resume(resume: Resume, side: Side) -> Side:
    side = side.inside(resume.name)
    for command in resume.before:
        side.run(command)
    return side


def read_marks(folder: Path, name: str) -> set[bytes | int]:
    """Return data that changes if a file is rewritten from the start.

    That is the modification time, or the first three lines of JSON lines, which contain
    times.
    """
    return {
        b"\n".join(path.read_bytes().split(b"\n")[:3])
        if path.suffix == ".jsonl"
        else path.stat().st_mtime_ns
        for path in folder.rglob(name)
    }


def read_resumed(side: Side, ignored: Collection[str]) -> Files:
    files = side.read_results()
    for name, content in files.items():
        if name.endswith("metrics.jsonl"):
            files[name] = INTERRUPTION.sub(b"", content)
        if name.endswith("training_checkpoint_last.pt"):
            files[name] = serialize_values(content)
    return {
        name: content
        for name, content in files.items()
        if PurePosixPath(name).name not in ignored
    }


def serialize_values(content: bytes) -> bytes:
    """Return all values of a pickle without its encoding of shared objects."""
    import torch

    def plain(value: object) -> object:
        match value:
            case dict():
                return {key: plain(inner) for key, inner in value.items()}
            case list() | tuple():
                return [plain(inner) for inner in value]
            case torch.Tensor():
                raw = value.contiguous().view(-1).view(torch.uint8)
                return value.dtype, value.shape, raw.numpy().tobytes()
        return value

    return repr(plain(torch.load(io.BytesIO(content), weights_only=True))).encode()


# Differences -----------------------------------------------------------------------


@dataclass
class Report:
    """Prints a line for each check and counts those that differ."""

    differing: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, name: str, make: Callable[[], tuple[Files, Files]]) -> None:
        try:
            expected, actual = make()
            problems = list(describe_differences(expected, actual))
            counted = f"{len(expected)} files"
            if not expected:
                problems = ["nothing to compare"]
        except (CheckError, subprocess.SubprocessError) as error:
            problems, counted = [str(error)], ""
        if not problems:
            print(f"same     {name} ({counted})", flush=True)
            return
        self.differing += 1
        print(f"DIFFERS  {name}", flush=True)
        for problem in problems[:MOST_SHOWN]:
            print(f"         - {problem}", flush=True)
        if len(problems) > MOST_SHOWN:
            print(f"         - and {len(problems) - MOST_SHOWN} more", flush=True)


def describe_differences(expected: Files, actual: Files) -> Iterator[str]:
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            yield f"{name} is missing in NEW"
        elif name not in expected:
            yield f"{name} is only in NEW"
        elif expected[name] != actual[name]:
            yield f"{name}: {describe_difference(name, expected[name], actual[name])}"


def describe_difference(name: str, old: bytes, new: bytes) -> str:
    read = read_tensors if name.endswith(".safetensors") else None
    read = read_zip if old.startswith(b"PK") and new.startswith(b"PK") else read
    if read is not None:
        before, after = read(old), read(new)
        names = sorted(before.keys() | after.keys())
        unequal = [n for n in names if before.get(n) != after.get(n)]
        return f"{len(unequal)} of {len(names)} parts, as {', '.join(unequal[:3])}"
    pairs = enumerate(zip(old, new, strict=False))
    position = next((i for i, (a, b) in pairs if a != b), min(len(old), len(new)))
    around = slice(max(0, position - 30), position + 40)
    return f"from byte {position}: {old[around]!r} | {new[around]!r}"


def read_tensors(content: bytes) -> Files:
    header, tensors = split_safetensors(content)
    parts = {}
    for name, entry in json.loads(header).items():
        start, end = entry.pop("data_offsets", (0, 0))
        parts[name] = json.dumps(entry).encode() + tensors[start:end]
    return parts


def read_zip(content: bytes) -> Files:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# Packages --------------------------------------------------------------------------

MOVED = {  # data files: path in OLD -> path in NEW
    "mlx_openelm/serving.html": "mlx_openelm/serving/page.html",
    "converters/calibration.txt": "converters/quantization/calibration.txt",
}
NAME_ONLY = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml"),
)
UNTRACKED = shutil.ignore_patterns(
    *(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "dist")
)


def compare_packages(old: Side, new: Side) -> tuple[Files, Files]:
    expected = read_data_files(build(old))
    actual = read_data_files(build(new))
    for kind in ("sdist", "wheel"):
        for before, after in MOVED.items():
            if f"{kind}: {after}" in actual and f"{kind}: {before}" in expected:
                expected[f"{kind}: {after}"] = expected.pop(f"{kind}: {before}")
    return expected, actual


def build(side: Side) -> Path:
    """Build sdist and wheel from a copy, so that the checkout stays unchanged."""
    folder = side.inside("packages").folder
    copy, out = folder / "copy", folder / "out"
    shutil.copytree(side.checkout, copy, ignore=UNTRACKED)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    ran = subprocess.run([*command, str(copy)], capture_output=True, timeout=TIMEOUT_S)
    if ran.returncode:
        raise CheckError(f"{side.name}: build failed: {last_line(ran.stderr)}")
    return out


def read_data_files(folder: Path) -> Files:
    """Return all files except Python files, tests and benchmarks.

    For the project's documents and configuration and the wheel's RECORD, only the names
    are compared; for the package metadata, the part before the README.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        kind = "wheel" if path.suffix == ".whl" else "sdist"
        members = read_zip(path.read_bytes()) if kind == "wheel" else read_tar(path)
        for name, content in members.items():
            if name.endswith(".py") or name.startswith(("tests/", "benchmarks/")):
                continue
            last = PurePosixPath(name).name
            if name in NAME_ONLY or last == "RECORD":
                content = b""
            elif last in ("METADATA", "PKG-INFO"):
                content = content.partition(b"\n\n")[0]
            files[f"{kind}: {name}"] = content
    return files


def read_tar(path: Path) -> Files:
    """Return the files below the archive's top-level folder."""
    with tarfile.open(path) as archive:
        return {
            member.name.partition("/")[2]: archive.extractfile(member).read()
            for member in archive.getmembers()
            if member.isfile()
        }


# Start-up --------------------------------------------------------------------------


def compare_starts(old: Side, new: Side, rounds: int) -> None:
    """Print the median times to the first byte, after a warm-up run."""
    for name, command in (
        ("--help", "--help"),
        ("generate", "generate -p 'Once upon' --model demo -m 4 --quiet"),
    ):
        seconds: dict[str, list[float]] = {old.name: [], new.name: []}
        for turn in range(rounds + 1):
            for side in (old, new) if turn % 2 else (new, old):
                seconds[side.name].append(time_first_byte(side, command))
        before, after = (statistics.median(times[1:]) for times in seconds.values())
        print(
            f"start    {name}: OLD {before:.3f} s, NEW {after:.3f} s, "
            f"ratio {after / before:.3f}",
            flush=True,
        )


def time_first_byte(side: Side, command: str) -> float:
    started = time.perf_counter()
    with ended(side.start(command)) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        return time.perf_counter() - started


# All -------------------------------------------------------------------------------


def compare_all(old: Side, new: Side, args: argparse.Namespace) -> Report:
    report = Report()

    def selected(name: str, *needed: str) -> bool:
        if not re.search(args.only, name):
            return False
        missing = [module for module in needed if not find_spec(module)]
        if missing:
            print(f"skipped  {name}: {missing[0]} is not installed", flush=True)
        return not missing

    for check in CHECKS:
        if (check.quick or not args.quick) and selected(check.name, check.needs):
            report.add(check.name, partial(run_check, check, old, new))
    if selected("packages", "build", "hatchling"):
        report.add("packages", partial(compare_packages, old, new))
    if selected("start-up"):
        compare_starts(old, new, args.rounds)
    return report


def check_imports(side: Side) -> None:
    """Exit if the side's Python imports the packages from another checkout."""
    code = "import mlx_openelm, converters; print(mlx_openelm.__file__)"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=side.folder,
        env=side.environment(),
        capture_output=True,
        text=True,
    )
    if not ran.stdout.startswith(f"{side.checkout}{os.sep}"):
        sys.exit(f"{side.name} imports from {ran.stdout or ran.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--quick", action="store_true", help="skip slow checks")
    parser.add_argument("--only", default="", help="regex of the names of checks")
    parser.add_argument("--rounds", type=int, default=7, help="for start-up times")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compare-") as name:
        scratch = Path(name).resolve()
        old = Side("OLD", args.old.resolve(), scratch)
        new = Side("NEW", args.new.resolve(), scratch)
        for side in (old, new):
            check_imports(side)
        report = compare_all(old, new, args)
    print(
        f"{report.differing} checks differ; {time.monotonic() - report.started:.0f} s"
    )
    return 1 if report.differing else 0


if __name__ == "__main__":
    sys.exit(main())
