"""The benchmark of CoreNet's MLX script, step by step (`bench --protocol apple`).

A prompt of 36 tokens (BOS included) and 1,024 new tokens, greedy, without a stop at
EOS; after the first token, 8 tokens are evaluated together. The first call is cold:
nothing is warmed up. float16 weights, bfloat16 for the 3B; 4 bits in groups of 64
beside a 16-bit embedding; logits of 32,128 rows. Rates are

    prompt       prompt tokens / time to the first token of the cold call
    generation   all new tokens / time after the first token
    total        prompt and new tokens / whole time
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_openelm.bench.measure import find_obstacle
from mlx_openelm.bench.models import Form, make_model
from mlx_openelm.bench.plan import Case, Subject, make_subject
from mlx_openelm.bench.published_speeds import find_published
from mlx_openelm.bench.report import Cell, Figure
from mlx_openelm.config import OpenELMConfig, pad_vocabulary
from mlx_openelm.device import compute_dtype
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.cache import KVCache
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.quantization import Packing
from mlx_openelm.storage.model_folder import spell_dtype

SIZES = ("270M", "450M", "1.1B", "3B")  # of the published table
PROMPT_TOKENS, NEW_TOKENS, TOGETHER = 36, 1024, 8
BITS, GROUP_SIZE = (16, 4), 64


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds to the first token and of the whole call, and its number of tokens."""

    first: float
    whole: float
    prompt_tokens: int
    new_tokens: int

    @property
    def prompt_tps(self) -> float:
        return self.prompt_tokens / self.first

    @property
    def generation_tps(self) -> float:
        return self.new_tokens / (self.whole - self.first)

    @property
    def total_tps(self) -> float:
        return (self.prompt_tokens + self.new_tokens) / self.whole


def plan_apple_cases(sizes: Sequence[str], bits: Sequence[int]) -> list[Case]:
    """Return a case for each size (default: all) in each of the bits (16 and 4).

    Raises:
        OpenELMError: an unknown size, or bits that the published table does not have.
    """
    for number in bits:
        if number not in BITS:
            raise OpenELMError(
                f"`bits` is {number}; `protocol` apple has {BITS[0]} and {BITS[1]}."
            )
    cases = []
    for size in dict.fromkeys(sizes or SIZES):
        subject = make_subject(size)
        config = replace(
            subject.config, vocab_size=pad_vocabulary(subject.config.vocab_size)
        )
        padded = Subject(subject.name, config)
        cases += [
            Case(padded, number, 1, PROMPT_TOKENS, NEW_TOKENS)
            for number in dict.fromkeys(bits or BITS)
        ]
    return cases


def apple_form(config: OpenELMConfig, bits: int) -> tuple[str, Form]:
    """Return the weights of Apple's script in words, and their form on this device."""
    wide = config.model_dim >= OpenELMConfig.preset("3B").model_dim
    stored = mx.bfloat16 if wide else mx.float16
    packings = {}
    if bits != 16:
        packings = {
            name: Packing(bits, GROUP_SIZE)
            for name, shape in config.tensor_shapes().items()
            if len(shape) == 2 and "layers." in name
        }
    dtype = compute_dtype(stored)
    form = Form(dtype, packings if dtype == stored else {})
    return spell_dtype(stored), form


def measure_apple_cases(
    cases: Sequence[Case], rounds: int
) -> Iterator[tuple[int, Cell]]:
    """Yield the number and cell of each case, then again after each of its rounds.

    The prompt rate is that of the first round, whose call is cold.
    """
    computed: dict[tuple[object, ...], int] = {}  # measured computation: bits
    for number, case in enumerate(cases):
        config = case.subject.config
        stored, form = apple_form(config, case.bits)
        cell = _describe(case, stored, form)
        same = computed.get((case.subject.name, form.key))
        obstacle = find_obstacle(case, form, same)
        cell = replace(cell, skipped=obstacle)
        yield number, cell
        if obstacle:
            continue
        computed[case.subject.name, form.key] = case.bits
        model = make_model(config, form)
        timings: list[Timing] = []
        try:
            for _ in range(rounds):
                mx.reset_peak_memory()
                timings.append(time_call(model, case.prompt_tokens, case.new_tokens))
                cell = replace(
                    cell,
                    rounds=len(timings),
                    prompt_tps=Figure.of([timings[0].prompt_tps]),
                    first_token_s=Figure.of([timings[0].first]),
                    generation_tps=Figure.of([one.generation_tps for one in timings]),
                    total_tps=Figure.of([one.total_tps for one in timings]),
                    peak_memory_bytes=mx.get_peak_memory(),
                )
                yield number, cell
        except RuntimeError as error:  # out of memory on a GPU despite the estimate
            yield number, replace(cell, skipped=f"MLX failed: {error}")
        del model
        mx.clear_cache()


def time_call(model: OpenELM, prompt_tokens: int, new_tokens: int) -> Timing:
    """Time one call of the script's generator."""
    started = time.perf_counter()
    tokens = _generate(model, prompt_tokens, new_tokens)
    next(tokens)
    first = time.perf_counter() - started
    count = 1 + sum(1 for _ in tokens)
    whole = time.perf_counter() - started
    return Timing(first, whole, prompt_tokens, count)


def _generate(
    model: OpenELM, prompt_tokens: int, new_tokens: int
) -> Iterator[mx.array]:
    """Yield greedy tokens, evaluated one first and then 8 together."""
    span = model.config.vocab_size - 3  # without unknown, BOS and EOS
    ids = [1, *(3 + 7919 * n % span for n in range(prompt_tokens - 1))]
    cache = [KVCache() for _ in model.layers]
    token = model(mx.array([ids]), cache)[:, -1].argmax(axis=-1)  # (1,)
    mx.eval(token)
    yield token
    waiting: list[mx.array] = []
    for left in range(new_tokens - 2, -1, -1):
        token = model(token[:, None], cache)[:, -1].argmax(axis=-1)
        waiting.append(token)
        if len(waiting) == TOGETHER or not left:
            mx.eval(waiting)
            yield from waiting
            waiting = []


def _describe(case: Case, stored: str, form: Form) -> Cell:
    subject = case.subject
    computed = (
        str(form) if form.dtype == getattr(mx, stored) else f"{form}, not {stored}"
    )
    return Cell(
        model=subject.name,
        made=True,
        adapter=None,
        bits=case.bits,
        batch=1,
        context=case.context,
        prompt_tokens=case.prompt_tokens,
        new_tokens=case.new_tokens,
        computed_with=computed,
        published=find_published(subject.name, case.bits),
    )
