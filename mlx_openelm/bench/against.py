"""Speed compared with stock mlx-lm on the same weights, in alternating rounds."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mlx_openelm.bench.against_worker import OURS, THEIRS
from mlx_openelm.bench.plan import PROMPT
from mlx_openelm.bench.report import Figure
from mlx_openelm.device import Machine, compute_dtype, describe_machine
from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import parse_json
from mlx_openelm.storage.loading import stored_dtype
from mlx_openelm.storage.model_folder import ModelFolder, spell_dtype
from mlx_openelm.version import __version__

STEPS = 12  # of LoRA, the first third not counted


@dataclass(frozen=True, slots=True)
class Comparison:
    """One measure of both programs.

    Attributes:
        unit: "tokens/s", where more is better, or "s".
        ratio: how many times faster mlx-openelm is, of the pairs of each round.
        problem: why it was not measured, or empty.
    """

    name: str
    unit: str
    ours: Figure | None = None
    theirs: Figure | None = None
    ratio: Figure | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class AgainstReport:
    """All measures of a model."""

    version: str
    against: str
    machine: Machine
    model: str
    computed_with: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    measures: tuple[Comparison, ...]


Speeds = dict[str, float]


def compare_with_mlx_lm(
    folder: ModelFolder,
    *,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    on_step: Callable[[str], None] = lambda name: None,
) -> AgainstReport:
    """Measure decoding, prompt, first token from the shell, LoRA and conversion.

    Raises:
        OpenELMError: mlx-lm is not installed.
    """
    if find_spec("mlx_lm") is None:
        raise OpenELMError(
            "mlx-lm is not installed; `against` needs it: pip install mlx-lm."
        )
    from importlib.metadata import version

    path = str(folder.path.resolve())
    decoding = {
        "model": path,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
    }
    training = {"model": path, "steps": STEPS}
    measures: list[Comparison] = []
    for names, unit, measure in (
        (
            ("decode", "prompt"),
            "tokens/s",
            lambda engine: _in_process(engine, "decode", decoding),
        ),
        (
            ("train",),
            "tokens/s",
            lambda engine: _in_process(engine, "train", training),
        ),
        (("shell",), "s", lambda engine: {"shell": _time_shell(engine, path)}),
        (("convert",), "s", lambda engine: {"convert": _time_convert(engine, path)}),
    ):
        on_step(_TITLES[names[0]])
        measures += _compare(names, unit, measure, rounds)
    dtype = compute_dtype(stored_dtype(folder))
    return AgainstReport(
        version=__version__,
        against=f"mlx-lm {version('mlx-lm')}",
        machine=describe_machine(),
        model=folder.path.name,
        computed_with=spell_dtype(dtype),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        measures=tuple(measures),
    )


_TITLES = {
    "decode": "new tokens",
    "prompt": "prompt",
    "shell": "from the shell to the answer of one token",
    "train": "LoRA, rank 8, batches of 4",
    "convert": "conversion to 4 bits",
}


def _compare(
    names: Sequence[str], unit: str, measure: Callable[[str], Speeds], rounds: int
) -> Iterator[Comparison]:
    """Measure both programs in turn, each first in every other round."""
    found: dict[str, list[Speeds]] = {OURS: [], THEIRS: []}
    try:
        for number in range(rounds):
            for engine in (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS):
                found[engine].append(measure(engine))
    except OpenELMError as error:
        for name in names:
            yield Comparison(_TITLES[name], unit, problem=str(error))
        return
    for name in names:
        ours, theirs = ([s[name] for s in found[e]] for e in (OURS, THEIRS))
        pairs = zip(ours, theirs, strict=True)
        ratios = [a / b if unit == "tokens/s" else b / a for a, b in pairs]
        yield Comparison(
            _TITLES[name], unit, Figure.of(ours), Figure.of(theirs), Figure.of(ratios)
        )


def _in_process(engine: str, step: str, options: dict[str, object]) -> Speeds:
    module = "mlx_openelm.bench.against_worker"
    result = _run([module, engine, step, json.dumps(options)], engine)
    speeds: Speeds = parse_json(result.stdout)
    return speeds


def _time_shell(engine: str, model: str) -> float:
    command = ["--prompt", PROMPT, "--max-tokens", "1", "--temp", "0", "--model", model]
    if engine == OURS:
        command = ["mlx_openelm", "generate", *command, "--quiet", "--offline"]
    else:
        command = ["mlx_lm", "generate", *command, "--ignore-chat-template"]
    started = time.perf_counter()
    _run(command, engine)
    return time.perf_counter() - started


def _time_convert(engine: str, model: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out")
        command = ["mlx_lm", "convert", "--hf-path", model, "--mlx-path", out, "-q"]
        if engine == OURS:
            command = ["mlx_openelm", "convert", model, "--mlx-path", out, "-q"]
        started = time.perf_counter()
        _run(command, engine)
        return time.perf_counter() - started


def _run(arguments: list[str], engine: str) -> "subprocess.CompletedProcess[str]":
    result = subprocess.run(
        [sys.executable, "-m", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise OpenELMError(f"{engine} failed: {last}")
    return result
