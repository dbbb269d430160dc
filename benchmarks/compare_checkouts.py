"""Check that two checkouts of this project behave the same, byte for byte.

    python benchmarks/compare_checkouts.py OLD NEW [--quick] [--only REGEX] [--rounds 7]

Each side runs `PYTHONPATH=<checkout> python -m mlx_openelm ...` in folders of its own.
The scenarios (checkout_scenarios.py) compare every file that a command writes and what
it prints. The resume scenarios stop a command under OLD, repeat it under NEW, and
compare the result with that of an uninterrupted run under OLD. The built packages are
compared by their data files. At the end the start-up times of both are printed. The
exit status is 1 if anything differs.

Left out of the comparison, and nothing else:

- the paths of the checkout and of the working folder, replaced by placeholders;
- the numbers of the JSON keys in `VARYING`: times, speeds and measured memory;
- in report.html all numbers, and lines that are equal without them (axis ticks of the
  charts of speed); in resumed runs the file itself, which tells of the interruption;
- in metrics.jsonl of resumed runs the events in `INTERRUPTION`;
- in packages what `read_data_files` leaves out.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from checkout_scenarios import CHECKS, INPUTS, Resume, Scenario

Files = dict[str, bytes]  # by name, or by "stdout of COMMAND"
Process = subprocess.Popen[bytes]

TIMEOUT_S = 600
MOST_SHOWN = 5  # differences of one check

_SPEEDS = (
    *("prompt_tps", "generation_tps", "time_to_first_token_s", "peak_memory_bytes"),
    *("seconds", "tokens_per_second"),
)
VARYING = {  # file name -> JSON keys whose numbers are not compared
    "stdout": _SPEEDS,
    "answers.jsonl": _SPEEDS,
    "metrics.jsonl": (*_SPEEDS, "memory_bytes", "seconds_left"),
    "state.safetensors": ("seconds", "reported", "peak_memory"),
}
INTERRUPTION = re.compile(  # a kill may come between a save and its line
    rb'\{"event": "(?:save|saved|resume|started)".*\n'
    rb'|\{"event": "end".*"reason": "interrupted".*\n'
)
BINARY = (".pt", ".gguf", ".model", ".png")


class CheckError(Exception):
    """A command did not do what the check needs, so nothing is proved."""


# Running ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A checkout, and the folder in which its commands run."""

    name: str
    checkout: Path
    folder: Path

    def inside(self, name: str) -> "Side":
        """Return the side with a new folder below its own; it holds the inputs."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        for file, text in INPUTS.items():
            (folder / file).write_text(text)
        return replace(self, folder=folder)

    def environment(self) -> dict[str, str]:
        ours = {
            "PYTHONPATH": str(self.checkout),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.folder.parent / ".hub"),
            "COLUMNS": "100",
        }
        if sys.platform == "linux":
            ours["MLX_DISABLE_COMPILE"] = "1"
        others = ("MLX_", "PYTHON", "HF_", "OMP_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        return kept | ours

    def start(self, command: str) -> Process:
        environment = self.environment()
        if command.startswith(("pretrain", "grow")):
            environment["OMP_NUM_THREADS"] = "1"  # more are slower for a small model
        return subprocess.Popen(
            [sys.executable, "-m", "mlx_openelm", *shlex.split(command)],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, command: str, status: int = 0) -> bytes:
        """Return stdout; or stderr, where another exit status than 0 is expected."""
        with ended(self.start(command)) as process:
            out, err = process.communicate(timeout=TIMEOUT_S)
        if process.returncode != status:
            raise CheckError(
                f"{self.name}: {command!r} exited with {process.returncode}: "
                f"{last_line(err)}"
            )
        return err if status else out

    def stop(self, command: str, ready: Callable[[Path], bool], by: int) -> None:
        """Start a command, and send it a signal as soon as its folder is ready."""
        deadline = time.monotonic() + TIMEOUT_S
        with ended(self.start(command)) as process:
            while process.poll() is None and not ready(self.folder):
                if time.monotonic() > deadline:
                    raise CheckError(
                        f"{self.name}: {command!r} was never to be stopped"
                    )
                time.sleep(0.002)
            process.send_signal(by)
            _, err = process.communicate(timeout=TIMEOUT_S)
        if process.returncode == 0 or not ready(self.folder):
            raise CheckError(
                f"{self.name}: {command!r} ended before it was stopped: {last_line(err)}"
            )

    def read_results(self) -> Files:
        """Return the normalised content of all files but the inputs."""
        paths = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        named = {path.relative_to(self.folder).as_posix(): path for path in paths}
        return {
            name: self.normalise(path.name, path.read_bytes())
            for name, path in named.items()
            if name not in INPUTS
        }

    def normalise(self, name: str, content: bytes) -> bytes:
        """Replace what may vary in a file, or in what a command prints ("stdout")."""
        if name.endswith(BINARY):
            return content
        if name.endswith(".safetensors"):
            header, tensors = split_safetensors(content)
            header = self._mask(name, header).rstrip()
            return len(header).to_bytes(8, "little") + header + tensors
        content = self._mask(name, content)
        if name == "report.html":
            lines = re.sub(rb"-?\d[\d.,]*", b"#", content).splitlines()
            return b"\n".join(dict.fromkeys(lines))
        return content

    def _mask(self, name: str, content: bytes) -> bytes:
        for path, mark in ((self.folder, b"<folder>"), (self.checkout, b"<checkout>")):
            content = content.replace(os.fsencode(path), mark)
        keys = "|".join(VARYING.get(name, ()))
        number = rb'(\\?"(?:%s)\\?": )-?\d[-+.\de]*' % keys.encode()
        return re.sub(number, rb"\1#", content) if keys else content


@contextlib.contextmanager
def ended(process: Process) -> Iterator[Process]:
    """Kill the process at the end of the block, if it still runs."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def last_line(text: bytes) -> str:
    return (text.decode(errors="replace").strip().splitlines() or ["no message"])[-1]


# Scenarios -------------------------------------------------------------------------


def run_check(check: Scenario | Resume, old: Side, new: Side) -> tuple[Files, Files]:
    """Return what is expected, and what was found."""
    if isinstance(check, Scenario):
        sides = (side.inside(check.name) for side in (old, new))
        expected, found = (run_scenario(check, side) for side in sides)
        return expected, found
    return run_resume(check, old, new)


def run_scenario(scenario: Scenario, side: Side) -> Files:
    stream = "stderr" if scenario.status else "stdout"
    printed = {
        f"{stream} of {command!r}": side.normalise(
            "stdout", side.run(command, scenario.status)
        )
        for command in scenario.commands
    }
    return side.read_results() | printed


def run_resume(resume: Resume, old: Side, new: Side) -> tuple[Files, Files]:
    whole, stopped = old.inside(resume.name), old.inside(f"{resume.name}, stopped")
    for side in (whole, stopped):
        for command in resume.before:
            side.run(command)
    whole.run(resume.command)
    stopped.stop(resume.command, resume.ready, resume.by)
    kept = read_times(stopped.folder, resume.kept)
    resumed = replace(new, folder=stopped.folder)
    resumed.run(f"{resume.command} {resume.flag}")
    if not kept <= read_times(stopped.folder, resume.kept):
        raise CheckError(f"{resume.kept} was written again by the resumed command")
    expected, found = (
        {
            name: INTERRUPTION.sub(b"", content)
            if name.endswith("metrics.jsonl")
            else content
            for name, content in side.read_results().items()
            if PurePosixPath(name).name not in resume.ignored
        }
        for side in (whole, resumed)
    )
    return expected, found


def read_times(folder: Path, pattern: str) -> set[tuple[str, int]]:
    """Return name and time of writing of the files that match a pattern."""
    found = folder.rglob(pattern) if pattern else ()
    return {(path.name, path.stat().st_mtime_ns) for path in found}


# Differences -----------------------------------------------------------------------


@dataclass
class Report:
    """Prints a line for each check, and counts those that differ."""

    differing: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, name: str, make: Callable[[], tuple[Files, Files]]) -> None:
        try:
            expected, found = make()
            problems = list(describe_differences(expected, found))
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


def describe_differences(expected: Files, found: Files) -> Iterator[str]:
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing in NEW"
        elif name not in expected:
            yield f"{name} is only in NEW"
        elif expected[name] != found[name]:
            yield f"{name}: {describe_difference(name, expected[name], found[name])}"


def describe_difference(name: str, old: bytes, new: bytes) -> str:
    parts_of = {".safetensors": read_tensors, ".pt": read_zip}
    read = parts_of.get(PurePosixPath(name).suffix)
    if read is not None:
        parts = [read(old), read(new)]
        names = sorted(parts[0].keys() | parts[1].keys())
        unequal = [n for n in names if parts[0].get(n) != parts[1].get(n)]
        return f"{len(unequal)} of {len(names)} parts, as {', '.join(unequal[:3])}"
    place = len(os.path.commonprefix([old, new]))
    around = slice(max(0, place - 30), place + 40)
    return f"from byte {place}: {old[around]!r} | {new[around]!r}"


def split_safetensors(content: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


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

MOVED = {  # data files: the place in OLD -> the place in NEW
    "mlx_openelm/serving.html": "mlx_openelm/serving/page.html",
    "converters/calibration.txt": "converters/quantization/calibration.txt",
}
NAME_ONLY = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "RECORD")
UNTRACKED = shutil.ignore_patterns(
    *(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "dist")
)


def compare_packages(old: Side, new: Side) -> tuple[Files, Files]:
    expected, found = (read_data_files(build(side)) for side in (old, new))
    for kind in ("sdist", "wheel"):
        for before, after in MOVED.items():
            if f"{kind}: {after}" in found and f"{kind}: {before}" in expected:
                expected[f"{kind}: {after}"] = expected.pop(f"{kind}: {before}")
    return expected, found


def build(side: Side) -> Path:
    """Build sdist and wheel from a copy, so that the checkout stays as it is."""
    copy, out = side.folder / "packages/copy", side.folder / "packages/out"
    shutil.copytree(side.checkout, copy, ignore=UNTRACKED)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    ran = subprocess.run([*command, str(copy)], capture_output=True, timeout=TIMEOUT_S)
    if ran.returncode:
        raise CheckError(f"{side.name}: build failed: {last_line(ran.stderr)}")
    return out


def read_data_files(folder: Path) -> Files:
    """Return what is no Python and no test or benchmark.

    Of the project's documents and configuration, and of the list of the wheel's files,
    only the names count; of the package's metadata, what stands before the README.
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
    """Return the files below the archive's one folder."""
    with tarfile.open(path) as archive:
        return {
            member.name.partition("/")[2]: archive.extractfile(member).read()
            for member in archive.getmembers()
            if member.isfile()
        }


# Start-up --------------------------------------------------------------------------


def compare_starts(old: Side, new: Side, rounds: int) -> None:
    """Print the medians of the time to the first byte; a first run warms the caches."""
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

    def wanted(name: str, *needed: str) -> bool:
        if not re.search(args.only, name):
            return False
        missing = [module for module in needed if not find_spec(module)]
        if missing:
            print(f"skipped  {name}: there is no {missing[0]}", flush=True)
        return not missing

    for check in CHECKS:
        if (check.quick or not args.quick) and wanted(check.name, check.needs):
            report.add(check.name, partial(run_check, check, old, new))
    if wanted("packages", "build", "hatchling"):
        report.add("packages", partial(compare_packages, old, new))
    if wanted("start-up"):
        sides = (side.inside("start-up") for side in (old, new))
        compare_starts(*sides, rounds=args.rounds)
    return report


def check_imports(side: Side) -> None:
    """Exit if the side's Python would import the packages from another checkout."""
    side.folder.mkdir()
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
    parser.add_argument("--quick", action="store_true", help="leave out the slow ones")
    parser.add_argument("--only", default="", help="checks whose name this regex finds")
    parser.add_argument("--rounds", type=int, default=7, help="of the start-up times")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compare-") as name:
        scratch = Path(name).resolve()
        old = Side("OLD", args.old.resolve(), scratch / "old")
        new = Side("NEW", args.new.resolve(), scratch / "new")
        for side in (old, new):
            check_imports(side)
        report = compare_all(old, new, args)
    print(
        f"{report.differing} checks differ; {time.monotonic() - report.started:.0f} s"
    )
    return 1 if report.differing else 0


if __name__ == "__main__":
    sys.exit(main())
