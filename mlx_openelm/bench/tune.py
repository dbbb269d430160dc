"""Measures which settings of `Tuning` are fastest on this machine.

Every setting is compared with the default in alternating rounds. It is chosen only if
its output (tokens, or trained weights) is identical, and its median is above the best
round of the default and `MARGIN` above the default's median. Variables that MLX reads
when it starts are tried in processes of their own.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_openelm.bench.machine import measure_bandwidth
from mlx_openelm.bench.models import (
    Form,
    count_step_bytes,
    load_subject,
    make_model,
)
from mlx_openelm.bench.plan import make_subject, open_subject
from mlx_openelm.bench.report import Figure
from mlx_openelm.bench.training import make_update
from mlx_openelm.device import (
    Machine,
    compute_dtype,
    describe_machine,
    runs_on_gpu,
    takes_gpu_path,
    wired_memory,
)
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.samples import Sample
from mlx_openelm.generation.decoding import PREFILL_CHUNK, Context, draw_tokens
from mlx_openelm.generation.options import Sampling
from mlx_openelm.input_files import parse_json
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.training.arrays import digest_arrays, trained_tensors
from mlx_openelm.tuning import DEFAULT, QUEUES, VARIABLES, Tuning
from mlx_openelm.version import __version__

MARGIN = 0.03  # a setting must be faster by this share
ROUNDS, SECONDS = 5, 540
CHUNKS = (128, 256, 512, 1024, 2048)
_NO_TIME = "no time was left"
TF32 = "MLX_ENABLE_TF32"  # reported, never applied: it changes results
_ENVIRONMENTS: tuple[Mapping[str, str], ...] = (
    {},
    *({VARIABLES[0]: count} for count in ("20", "50", "100", "200")),
    *({VARIABLES[1]: megabytes} for megabytes in ("20", "80", "200")),
    *({VARIABLES[0]: "100", VARIABLES[1]: "200"},),
    {TF32: "0"},
    {TF32: "1"},
)


@dataclass(frozen=True, slots=True)
class Workload:
    """How much is measured.

    Attributes:
        size: a released size with random weights; None: the demo model.
        rounds: for each setting.
        seconds: after which nothing more is started.
        compiles: whether `mx.compile` is tried.
        starts: whether processes with other environment variables are started.
    """

    size: str | None = None
    prompt_tokens: int = 1024
    new_tokens: int = 64
    steps: int = 20
    rounds: int = ROUNDS
    seconds: float = SECONDS
    compiles: bool = True
    starts: bool = True

    @classmethod
    def of_device(cls) -> "Workload":
        """Return what this device can measure in ten minutes."""
        if runs_on_gpu():
            return cls("270M")
        # On the CPU `mx.compile` calls the C++ compiler, and the variables do nothing.
        return cls(prompt_tokens=160, rounds=3, compiles=False, starts=False)


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting and its speed.

    Attributes:
        group: what is compared: trials of a group have the same unit.
        tokens_per_second: over the rounds; None if it was not measured.
        bandwidth_share: of decode steps.
        identical: whether the output is that of the first trial of its group.
        reason: why it was not measured, or empty.
    """

    group: str
    setting: str
    changes: Mapping[str, Any]
    tokens_per_second: Figure | None = None
    bandwidth_share: float | None = None
    identical: bool | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TuneReport:
    """All trials, and the settings that won."""

    version: str
    machine: Machine
    model: str
    bandwidth: float  # bytes per second
    trials: tuple[Trial, ...]
    chosen: Tuning
    seconds: float


Run = Callable[[], tuple[float, str]]  # returns tokens per second, digest of the output


def tune_machine(
    workload: Workload | None = None,
    on_trial: Callable[[str], None] = lambda name: None,
) -> TuneReport:
    """Measure the settings on this machine.

    Raises:
        OpenELMError: the installation lacks the demo model.
    """
    started = time.perf_counter()
    workload = workload or Workload.of_device()
    ends = started + workload.seconds
    bandwidth = measure_bandwidth(rounds=3).bytes_per_second
    model, name = _load(workload.size)
    trials: list[Trial] = []
    chosen = DEFAULT
    groups = (
        ("decode", _decode_settings(workload)),
        ("prompt", _prompt_settings()),
        ("training", _training_settings(workload)),
        ("wired memory", _wired_settings()),
    )
    for group, settings in groups:
        on_trial(group)
        run = _training_run if group == "training" else _decode_run
        measured = _compare(
            group,
            {
                setting: None
                if setting.startswith("not ")
                else run(model, workload, replace(chosen, **changes), group)
                for setting, changes in settings.items()
            },
            settings,
            workload.rounds,
            ends,
        )
        if group == "decode":
            read = count_step_bytes(model, 1, _decode_context(model, workload))
            measured = [
                trial
                if trial.tokens_per_second is None
                else replace(
                    trial,
                    bandwidth_share=trial.tokens_per_second.median * read / bandwidth,
                )
                for trial in measured
            ]
        trials += measured
        chosen = replace(chosen, **_winner(measured))
    on_trial("environment")
    in_processes = _try_environments(workload, ends)
    trials += in_processes
    applicable = [t for t in in_processes if TF32 not in t.changes]
    chosen = replace(chosen, environment=dict(_winner(applicable)))
    return TuneReport(
        version=__version__,
        machine=describe_machine(),
        model=name,
        bandwidth=bandwidth,
        trials=tuple(trials),
        chosen=chosen,
        seconds=time.perf_counter() - started,
    )


def _load(size: str | None) -> tuple[OpenELM, str]:
    if size is None:
        subject = open_subject(None, offline=True)
        return load_subject(subject, subject.bits, _stored_form()), "demo"
    return make_model(
        make_subject(size).config, _stored_form()
    ), f"{size}, random weights"


def _stored_form() -> Form:
    return Form(compute_dtype(mx.bfloat16), {})


# Comparison ----------------------------------------------------------------------


def _compare(
    group: str,
    runs: Mapping[str, Run | None],
    settings: Mapping[str, Mapping[str, Any]],
    rounds: int,
    ends: float,
) -> list[Trial]:
    """Measure all settings of a group in turn, as many rounds as time allows."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    digests: dict[str, set[str]] = {name: set() for name in runs}
    for number in range(rounds + 1):  # the first one compiles and is not counted
        for name, run in runs.items():
            if run is None or time.perf_counter() > ends:
                continue
            rate, digest = run()
            digests[name].add(digest)
            if number:
                rates[name].append(rate)
    first = next(iter(digests.values()))
    trials: list[Trial] = []
    for name, run in runs.items():
        trial = Trial(group, name, settings[name])
        if run is None:
            trial = replace(trial, reason="not possible here")
        elif not rates[name]:
            trial = replace(trial, reason=_NO_TIME)
        else:
            trial = replace(
                trial,
                tokens_per_second=Figure.of(rates[name]),
                identical=len(first) == 1 and digests[name] == first,
            )
        trials.append(trial)
    return trials


def _winner(trials: Sequence[Trial]) -> Mapping[str, Any]:
    """Return the changes of the fastest setting with the output of the first one."""
    if not trials or trials[0].tokens_per_second is None:
        return {}
    default, best = trials[0].tokens_per_second, trials[0]
    least = max(default.high, default.median * (1 + MARGIN))
    for trial in trials[1:]:
        speed = trial.tokens_per_second
        if trial.identical and speed is not None and speed.median > least:
            best, least = trial, speed.median
    return best.changes


def _digest(values: Sequence[int]) -> str:
    return hashlib.sha256(repr(list(values)).encode()).hexdigest()


# Generation ----------------------------------------------------------------------


def _decode_settings(workload: Workload) -> dict[str, dict[str, Any]]:
    compiled = takes_gpu_path()
    settings: dict[str, dict[str, Any]] = {}
    for own in (compiled, not compiled):
        kind = "compiled" if own else "not compiled"
        for queue in QUEUES:
            if own and not workload.compiles:
                continue
            same = own == compiled
            changes = {"queue": queue} | ({} if same else {"compiled": own})
            settings[f"queued {queue}, {kind}"] = changes
    return settings


def _prompt_settings() -> dict[str, dict[str, Any]]:
    chunks = [c for c in CHUNKS if c != PREFILL_CHUNK]
    settings: dict[str, dict[str, Any]] = {f"chunks of {PREFILL_CHUNK}": {}}
    return settings | {f"chunks of {c}": {"prefill_chunk": c} for c in chunks}


def _wired_settings() -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {"not wired": {}}
    if runs_on_gpu() and sys.platform == "darwin":
        return {"memory as it is": {}, "wired": {"wired": True}}
    return settings


def _decode_context(model: OpenELM, workload: Workload) -> int:
    return (
        min(workload.prompt_tokens, _room(model, workload)) + workload.new_tokens // 2
    )


def _room(model: OpenELM, workload: Workload) -> int:
    return model.config.max_context_length - workload.new_tokens


def _decode_run(model: OpenELM, workload: Workload, tuning: Tuning, group: str) -> Run:
    """Return a run whose rate is that of the prompt or of the new tokens."""
    context = Context(model, tuning=tuning)  # keeps its compiled step
    span = model.config.vocab_size - 3
    count = min(workload.prompt_tokens, _room(model, workload))
    ids = [3 + 7919 * n % span for n in range(count)]

    def run() -> tuple[float, str]:
        context.reuse([1])  # forgets the prompt
        with wired_memory(tuning.wired):
            started = time.perf_counter()
            tokens, times = [], []
            for token in draw_tokens(
                model, ids, Sampling(), workload.new_tokens, context=context
            ):
                tokens.append(token.id)
                times.append(time.perf_counter())
        rate = (len(times) - 2) / (times[-1] - times[1])  # the second one compiles
        if group == "prompt":
            rate = count / (times[0] - started)
        return rate, _digest(tokens)

    return run


# Training ------------------------------------------------------------------------


def _training_settings(workload: Workload) -> dict[str, dict[str, Any]]:
    compiled = takes_gpu_path()
    settings: dict[str, dict[str, Any]] = {}
    for own in (compiled, not compiled):
        name = "compiled steps" if own else "plain steps"
        if workload.compiles or not own:
            settings[name] = {} if own == compiled else {"compiled_training": own}
    return settings


def _training_run(
    model: OpenELM, workload: Workload, tuning: Tuning, group: str
) -> Run:
    """Return a run of LoRA steps on random tokens."""
    chosen = tuning.compiled_training
    compiled = takes_gpu_path() if chosen is None else chosen
    recipe = FinetuneRecipe(data="none", rank=8, num_layers=4)
    numbers = np.random.default_rng(0)
    samples = []
    for place in range(4 * workload.steps):
        length = int(numbers.integers(16, 64))
        tokens = numbers.integers(3, model.config.vocab_size, length).astype(np.int32)
        samples.append(Sample(tokens, np.arange(length) > 8, str(place)))
    parts = [samples[i : i + 4] for i in range(0, len(samples), 4)]

    def run() -> tuple[float, str]:
        copied = OpenELM(model.config)
        copied.update(model.parameters())
        update, trained = make_update(copied, recipe, parts, compiled=compiled)
        count, started = 0, time.perf_counter()
        for number, part in enumerate(parts):
            if number == len(parts) // 4:  # most shapes are compiled
                count, started = 0, time.perf_counter()
            count += update(part, 1e-3)
        seconds = time.perf_counter() - started
        return count / seconds, digest_arrays(trained_tensors(trained))

    return run


# Environment variables -----------------------------------------------------------

_PROCESS = "from mlx_openelm.bench.tune import print_speed; print_speed({!r})"


def print_speed(arguments: str) -> None:
    """Measure decoding in this process and write the result to stdout, as JSON."""
    workload = Workload(**parse_json(arguments))
    model, _ = _load(workload.size)
    run = _decode_run(model, workload, DEFAULT, "decode")
    run()
    results = [run() for _ in range(workload.rounds)]
    rates = [rate for rate, _ in results]
    digest = "".join(sorted({digest for _, digest in results}))
    logits = model(mx.array([[1, 5, 7, 11]]))
    exact = digest_arrays({"logits": logits})
    os.write(1, json.dumps([rates, digest + exact]).encode())


def _try_environments(workload: Workload, ends: float) -> list[Trial]:
    group = "environment, in new processes"
    trials: list[Trial] = []
    first = ""
    for environment in _ENVIRONMENTS:
        name = ", ".join(f"{k}={v}" for k, v in environment.items()) or "as it is"
        if not workload.starts:
            reason = "has no effect on the CPU"
        elif time.perf_counter() > ends:
            reason = _NO_TIME
        else:
            rates, digest, reason = _measure_in_process(workload, environment, ends)
            if rates:
                first = first or digest
                trials.append(
                    Trial(
                        group,
                        name,
                        environment,
                        Figure.of(rates),
                        identical=digest == first,
                    )
                )
                continue
        trials.append(Trial(group, name, environment, reason=reason))
    return trials


def _measure_in_process(
    workload: Workload, environment: Mapping[str, str], ends: float
) -> tuple[list[float], str, str]:
    """Return rates and the digest of the output, or neither and the reason."""
    settings = {
        "size": workload.size,
        "prompt_tokens": min(workload.prompt_tokens, 256),
        "new_tokens": workload.new_tokens,
        "rounds": min(workload.rounds, 3),
    }
    try:
        result = subprocess.run(
            [sys.executable, "-c", _PROCESS.format(json.dumps(settings))],
            env={**os.environ, **environment},
            capture_output=True,
            check=False,
            timeout=max(0.0, ends - time.perf_counter()),
        )
        rates, digest = parse_json(result.stdout)
    except subprocess.TimeoutExpired:
        return [], "", _NO_TIME
    except ValueError:
        return [], "", "the process failed"
    return rates, digest, ""
