"""The measurements of `bench`: speed of a model, and its share of the bandwidth.

Decoding one sequence reads every weight for every token and computes little with it, so
the share of the memory bandwidth shows how close a step is to the limit of the machine.
"""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_openelm.bench.machine import Bandwidth, available_memory
from mlx_openelm.bench.models import (
    Form,
    choose_form,
    count_step_bytes,
    estimate_memory,
    load_subject,
)
from mlx_openelm.bench.plan import PROMPT, ROUNDS, Case
from mlx_openelm.bench.report import Cell, Figure
from mlx_openelm.generation.cache import KVCache
from mlx_openelm.generation.decoding import PREFILL_CHUNK, draw_tokens
from mlx_openelm.generation.options import Sampling
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.quantization import GROUP_SIZES


def measure_cases(
    cases: Sequence[Case],
    bandwidth: Bandwidth,
    rounds: int = ROUNDS,
    on_note: Callable[[str], None] = lambda note: None,
) -> Iterator[tuple[int, Cell]]:
    """Yield the number and cell of each case, then again after each of its rounds.

    Args:
        on_note: receives each note about an adapter.

    Raises:
        OpenELMError: weights are damaged, or an adapter does not fit.
    """
    computed: dict[tuple[object, ...], int] = {}  # measured computation: bits
    numbered = list(enumerate(cases))
    for (subject, bits), group in itertools.groupby(
        numbered, key=lambda pair: (pair[1].subject, pair[1].bits)
    ):
        form = choose_form(subject, bits)
        runnable = []
        for number, case in group:
            same = (subject, form and form.key, case.batch, case.prompt_tokens)
            reason = find_obstacle(case, form, computed.get(same))
            cell = _describe(case, form, reason)
            yield number, cell
            if reason is None:
                computed[same] = bits
                runnable.append((number, case, cell))
        if not runnable or form is None:
            continue
        shell = None
        if subject.folder is not None and bits == subject.bits:
            # Before this process loads the weights: two copies may not fit.
            shell = Figure.of(time_shell(subject.folder.path, subject.adapter, rounds))
        model = load_subject(subject, bits, form, on_note)
        for number, case, cell in runnable:
            if case.batch == 1:
                cell = replace(cell, shell_first_token_s=shell)
            for measured in _measure_case(model, case, cell, bandwidth, rounds):
                yield number, measured
        del model
        mx.clear_cache()


def _describe(case: Case, form: Form | None, skipped: str | None) -> Cell:
    subject = case.subject
    return Cell(
        model=subject.name,
        made=subject.folder is None,
        adapter=None if subject.adapter is None else str(subject.adapter),
        bits=case.bits,
        batch=case.batch,
        context=case.context,
        prompt_tokens=case.prompt_tokens,
        new_tokens=case.new_tokens,
        computed_with="nothing" if form is None else str(form),
        skipped=skipped,
    )


def find_obstacle(case: Case, form: Form | None, same: int | None) -> str | None:
    """Return the reason why a case cannot be measured, or None.

    Args:
        same: bits of a measured case with the same computation, if there is one.
    """
    if form is None:
        sizes = ", ".join(map(str, sorted(GROUP_SIZES)))
        return f"no group of {sizes} weights divides its rows"
    if same is not None:
        return f"computed in {form} here, like {same} bits"
    needed, free = estimate_memory(case, form), available_memory()
    if needed > free:
        return f"takes about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free"
    return None


def _measure_case(
    model: OpenELM, case: Case, cell: Cell, bandwidth: Bandwidth, rounds: int
) -> Iterator[Cell]:
    # Mean number of tokens whose keys and values a step reads.
    attended = case.prompt_tokens + case.new_tokens / 2
    per_token = count_step_bytes(model, case.batch, attended) / case.batch
    firsts: list[float] = []
    rates: list[float] = []
    peak = 0
    try:
        warm_up = min(case.prompt_tokens, PREFILL_CHUNK)
        list(_draw(model, replace(case, prompt_tokens=warm_up, new_tokens=2)))
        for _ in range(rounds):
            mx.reset_peak_memory()
            started = time.perf_counter()
            times = [time.perf_counter() for _ in _draw(model, case)]
            peak = max(peak, mx.get_peak_memory())
            firsts.append(times[0] - started)
            rates.append(case.batch * (len(times) - 1) / (times[-1] - times[0]))
            generation = Figure.of(rates)
            assert generation is not None
            prompt = case.batch * case.prompt_tokens
            yield replace(
                cell,
                rounds=len(rates),
                bytes_per_token=per_token,
                prompt_tps=Figure.of([prompt / first for first in firsts]),
                generation_tps=generation,
                first_token_s=Figure.of(firsts),
                peak_memory_bytes=peak,
                bandwidth_share=generation.times(
                    per_token / bandwidth.bytes_per_second
                ),
            )
    except RuntimeError as error:  # out of memory on a GPU in spite of the estimate
        yield replace(cell, skipped=f"MLX failed: {error}")


def _draw(model: OpenELM, case: Case) -> Iterator[object]:
    """Decode and yield after each step, which draws one token of every sequence."""
    config = model.config
    span = config.vocab_size - 3  # without unknown, BOS and EOS
    ids = [3 + 7919 * n % span for n in range(case.batch * case.prompt_tokens)]
    if case.batch == 1:
        return draw_tokens(model, ids, Sampling(), case.new_tokens)
    return _draw_batch(model, mx.array(ids).reshape(case.batch, -1), case.new_tokens)


def _draw_batch(model: OpenELM, prompts: mx.array, count: int) -> Iterator[object]:
    """Decode prompts (B, T) greedily, each step queued before the last one is read."""
    cache = [KVCache() for _ in model.layers]
    for start in range(0, prompts.shape[1], PREFILL_CHUNK):
        hidden = model.transformer(prompts[:, start : start + PREFILL_CHUNK], cache)
        mx.eval([layer.state for layer in cache])
    tokens = model.head(hidden[:, -1]).argmax(axis=-1)  # (B,)
    mx.async_eval(tokens)
    for left in range(count - 1, -1, -1):
        following = tokens
        if left:
            hidden = model.transformer(tokens[:, None], cache)
            following = model.head(hidden[:, -1]).argmax(axis=-1)
            mx.async_eval(following)
        yield tokens.tolist()
        tokens = following


def time_shell(folder: Path, adapter: Path | None, rounds: int) -> list[float]:
    """Return the seconds from the start of `generate` to its first byte, each round.

    Empty if `generate` fails, for example without a tokenizer.
    """
    command = [sys.executable, "-m", "mlx_openelm", "generate", PROMPT]
    command += ["--max-tokens", "1", "--temp", "0", "--offline", "--quiet"]
    command += ["--model", str(folder.resolve())]
    if adapter is not None:
        command += ["--adapter-path", str(adapter.resolve())]
    seconds = []
    for _ in range(1 + rounds):  # the first one fills the file cache
        started = time.perf_counter()
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                assert process.stdout is not None
                process.stdout.read(1)
                seconds.append(time.perf_counter() - started)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            return []
    return seconds[1:]
