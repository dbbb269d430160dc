"""How fast models run on this machine, and how much of its memory bandwidth they use.

Decoding one sequence reads every weight for every token and computes little with it, so
the share of the bandwidth says how near a step is to what the machine allows.
"""

import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_openelm.bench.published_speeds import PublishedSpeed, find_published
from mlx_openelm.bench.selfcheck import PROMPT
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.device import (
    Machine,
    compute_dtype,
    describe_machine,
    runs_on_linux_cpu,
)
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.cache import KVCache
from mlx_openelm.generation.decoding import PREFILL_CHUNK, draw_tokens
from mlx_openelm.generation.sampling import Sampling
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.quantization import (
    AFFINE_BITS,
    GROUP_SIZES,
    Packing,
    Quantization,
)
from mlx_openelm.storage.adapter_folder import attach, open_adapter_folder
from mlx_openelm.storage.hub import DEMO, find_model
from mlx_openelm.storage.loading import load_model, make_quantized, stored_dtype
from mlx_openelm.storage.model_folder import ModelFolder, open_folder, spell_dtype
from mlx_openelm.tensor_names import EMBEDDING, HEAD, to_folder, to_module
from mlx_openelm.version import __version__

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 64, 3
BITS = (16, *reversed(AFFINE_BITS))
MADE_DTYPE = mx.bfloat16  # of weights that no folder has

# What is measured ----------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model: a folder's, with an adapter perhaps, or made weights of some sizes."""

    name: str
    config: OpenELMConfig
    folder: ModelFolder | None = None
    adapter: Path | None = None

    @property
    def bits(self) -> int:
        """Bits of most linears, as stored."""
        if self.folder is None:
            return 8 * MADE_DTYPE.size
        linears = [
            packing.bits
            for name, packing in self.folder.packings.items()
            if name not in (EMBEDDING, HEAD)
        ]
        if linears:
            return Counter(linears).most_common(1)[0][0]
        return 8 * stored_dtype(self.folder).size


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of the table: `batch` sequences of so many tokens at once."""

    subject: Subject
    bits: int
    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def context(self) -> int:
        """Tokens in each sequence when its last one is drawn."""
        return self.prompt_tokens + self.new_tokens

    @property
    def as_stored(self) -> bool:
        return self.bits == self.subject.bits


def open_subject(
    name: str | None, adapter_path: Path | None = None, *, offline: bool = False
) -> Subject:
    """Return a model folder's, with an adapter perhaps; see `loading.load`.

    Raises:
        OpenELMError: the model or the adapter is missing or damaged.
    """
    adapter = None if adapter_path is None else open_adapter_folder(adapter_path)
    if adapter is not None and name is None:
        path = adapter.find_base(offline=offline)
    else:
        path = find_model(name or DEMO, offline=offline)
    folder = open_folder(path)
    return Subject(Path(name or path.name).name, folder.config, folder, adapter_path)


def make_subject(size: str) -> Subject:
    """Return a released size ("270M", "1.1B") in made weights.

    Raises:
        OpenELMError: no OpenELM is called so.
    """
    config = OpenELMConfig.preset(size)
    return Subject(config.size_name, config)


@dataclass(frozen=True, slots=True)
class Workload:
    """What every model is measured at: all bits, with all batches, and all contexts.

    Attributes:
        bits: none: as stored.
        contexts: tokens of a sequence at its end; the prompt is what remains of them.
        prompt_tokens: where no contexts are said; None: 512, or what there is room for.
        new_tokens: None: 64, or half of the room.
    """

    bits: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = ()
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--prompt-tokens", self.prompt_tokens, 1),
            (
                "--max-tokens",
                self.new_tokens,
                2,
            ),  # the first one's time is the prompt's
            ("--rounds", self.rounds, 1),
            *(("--batch", batch, 1) for batch in self.batches),
        ):
            if value is not None and value < least:
                raise OpenELMError(f"{flag} is {value}; it is at least {least}.")
        for bits in self.bits:
            if bits not in BITS:
                known = ", ".join(map(str, BITS))
                raise OpenELMError(
                    f"--bits is {bits}; weights are measured in {known}."
                )
        for context in self.contexts:
            if context <= (self.new_tokens or 2):
                raise OpenELMError(
                    f"--context is {context}, which leaves no prompt before "
                    f"{self.new_tokens or 2} new tokens; say more, or fewer "
                    "--max-tokens."
                )
        if self.contexts and self.prompt_tokens is not None:
            raise OpenELMError(
                "--context says how long the prompt is, and so does --prompt-tokens; "
                "leave one of them out."
            )


def plan(subjects: Sequence[Subject], workload: Workload) -> list[Case]:
    """Return the cells of the table.

    Raises:
        OpenELMError: a model has no room for so many tokens.
    """
    cases = list[Case]()
    for subject in subjects:
        room = subject.config.max_context_length
        for bits, batch, context in itertools.product(
            dict.fromkeys(workload.bits or (subject.bits,)),
            dict.fromkeys(workload.batches),
            dict.fromkeys(workload.contexts or (None,)),
        ):
            total = room if context is None else context
            new_tokens = workload.new_tokens or max(2, min(NEW_TOKENS, total // 2))
            prompt_tokens = total - new_tokens
            if context is None:
                usual = max(1, min(PROMPT_TOKENS, prompt_tokens))
                prompt_tokens = workload.prompt_tokens or usual
            if prompt_tokens + new_tokens > room:
                raise OpenELMError(
                    f"{prompt_tokens} tokens of prompt and {new_tokens} new ones are "
                    f"more than the context of {subject.name}, {room} tokens."
                )
            cases.append(Case(subject, bits, batch, prompt_tokens, new_tokens))
    return cases


# What is found -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of some rounds, the least and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure | None":
        if not values:
            return None
        return cls(statistics.median(values), min(values), max(values))

    def times(self, factor: float) -> "Figure":
        return Figure(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """How fast MLX reads memory here.

    Attributes:
        bytes_per_second: of the fastest way, at its best.
        ways: bytes per second at best, by what was done.
    """

    bytes_per_second: float
    way: str
    ways: Mapping[str, float]
    num_bytes: int
    rounds: int


@dataclass(frozen=True, slots=True)
class Cell:
    """A case, and what was found of it.

    Attributes:
        made: the weights are made: speed does not depend on their values.
        computed_with: the form that the weights had here.
        bytes_per_token: what decoding a token must read, a batch's reads shared out.
        prompt_tps: and `generation_tps` count the tokens of all sequences.
        first_token_s: in this process, behind the whole prompt.
        shell_first_token_s: a new process, from its start to the first byte of its
            answer to a short prompt.
        bandwidth_share: bytes that must be read per second, over what MLX reads here.
        skipped: why nothing was measured.
    """

    model: str
    made: bool
    adapter: str | None
    bits: int
    batch: int
    context: int
    prompt_tokens: int
    new_tokens: int
    computed_with: str
    rounds: int = 0
    bytes_per_token: float | None = None
    prompt_tps: Figure | None = None
    generation_tps: Figure | None = None
    first_token_s: Figure | None = None
    shell_first_token_s: Figure | None = None
    peak_memory_bytes: int | None = None
    bandwidth_share: Figure | None = None
    published: PublishedSpeed | None = None
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All that was measured in one run.

    Attributes:
        compiled: whether steps go through mx.compile here.
        planned: cells that were asked for; fewer are here if the run was stopped.
    """

    version: str
    machine: Machine
    compiled: bool
    bandwidth: Bandwidth
    cells: tuple[Cell, ...]
    planned: int
    finished: bool


def report_bench(
    bandwidth: Bandwidth, cells: Sequence[Cell], planned: int, *, finished: bool
) -> BenchReport:
    """Put together what was found; a cell with no figure and no reason is left out."""
    told = tuple(cell for cell in cells if cell.rounds or cell.skipped)
    return BenchReport(
        version=__version__,
        machine=describe_machine(),
        compiled=is_compiled(),
        bandwidth=bandwidth,
        cells=told,
        planned=planned,
        finished=finished,
    )


def measure(
    cases: Sequence[Case],
    bandwidth: Bandwidth,
    rounds: int = ROUNDS,
    on_note: Callable[[str], None] = lambda note: None,
) -> Iterator[tuple[int, Cell]]:
    """Yield each case's number and cell, and again after every round of it.

    Args:
        on_note: is told what a person should know of an adapter.

    Raises:
        OpenELMError: weights are damaged, or an adapter does not fit.
    """
    computed: dict[tuple[object, ...], int] = {}  # what was measured, and in what bits
    numbered = list(enumerate(cases))
    for (subject, bits), group in itertools.groupby(
        numbered, key=lambda pair: (pair[1].subject, pair[1].bits)
    ):
        form = choose_form(subject, bits)
        runnable = []
        for number, case in group:
            same = (subject, form and form.key, case.batch, case.prompt_tokens)
            reason = _find_obstacle(case, form, computed.get(same))
            cell = _describe(case, form, reason)
            yield number, cell
            if reason is None:
                computed[same] = bits
                runnable.append((number, case, cell))
        if not runnable or form is None:
            continue
        shell = None
        if subject.folder is not None and bits == subject.bits:
            # Before this process holds the weights, too: two of them may not fit.
            shell = Figure.of(time_shell(subject.folder.path, subject.adapter, rounds))
        model = load_subject(subject, bits, form, on_note)
        for number, case, cell in runnable:
            if case.batch == 1:
                cell = replace(cell, shell_first_token_s=shell)
            for measured in _measure_case(model, case, cell, bandwidth, rounds):
                yield number, measured
        del model
        mx.clear_cache()


def _describe(case: Case, form: "Form | None", skipped: str | None) -> Cell:
    subject = case.subject
    published = None
    if case.batch == 1 and subject.adapter is None:
        published = find_published(subject.config.size_name, case.bits)
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
        published=published,
        skipped=skipped,
    )


def _measure_case(
    model: OpenELM, case: Case, cell: Cell, bandwidth: Bandwidth, rounds: int
) -> Iterator[Cell]:
    # A step after n others reads the keys and values of so many tokens, on the average.
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
    except RuntimeError as error:  # a GPU has no room for what was thought to fit
        yield replace(cell, skipped=f"MLX could not: {error}")


def _draw(model: OpenELM, case: Case) -> Iterator[object]:
    """Yield after each step that draws a token of every sequence."""
    config = model.config
    span = config.vocab_size - 3  # but for unknown, BOS and EOS
    ids = [3 + 7919 * n % span for n in range(case.batch * case.prompt_tokens)]
    if case.batch == 1:
        return draw_tokens(model, ids, Sampling(), case.new_tokens)
    return _draw_batch(model, mx.array(ids).reshape(case.batch, -1), case.new_tokens)


def _draw_batch(model: OpenELM, prompts: mx.array, count: int) -> Iterator[object]:
    """Continue prompts (B, T) greedily; the next step is queued before one is read."""
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
    """Return the seconds from starting `generate` to its first byte, of each round.

    Empty where it cannot answer: the folder has no tokenizer, say.
    """
    command = [sys.executable, "-m", "mlx_openelm", "generate", PROMPT]
    command += ["--max-tokens", "1", "--temp", "0", "--offline", "--quiet"]
    command += ["--model", str(folder.resolve())]
    if adapter is not None:
        command += ["--adapter-path", str(adapter.resolve())]
    found = []
    for _ in range(1 + rounds):  # the first one fetches files from the disk
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
                found.append(time.perf_counter() - started)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            return []
    return found[1:]


# The machine ---------------------------------------------------------------------


def measure_bandwidth(num_bytes: int | None = None, rounds: int = 5) -> Bandwidth:
    """Measure how fast MLX reads numbers that no processor's cache holds.

    One way is not the quickest everywhere (on the CPU a sum has one thread, and a
    matrix product all of them), so the best of several counts.

    Args:
        num_bytes: to be read; default 1 GiB on a GPU and half of that on the CPU, or
            less where memory is short.
    """
    if num_bytes is None:
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        enough = 2**30 if on_gpu else 2**29
        num_bytes = max(2**28, min(enough, available_memory() // 8))
    ways = _time_reads(num_bytes, rounds)
    mx.clear_cache()
    way = max(ways, key=lambda name: ways[name])
    return Bandwidth(ways[way], way, ways, num_bytes, rounds)


def _time_reads(num_bytes: int, rounds: int) -> dict[str, float]:
    """Return the bytes per second of the best round, by what was done."""
    width = 2048
    matrix = mx.ones((max(1, num_bytes // (4 * width)), width), mx.float32)
    row, column = mx.ones((1, width)), mx.ones((1, matrix.shape[0]))
    mx.eval(matrix, row, column)
    ways: dict[str, tuple[Callable[[], mx.array], int]] = {
        "a sum": (lambda: matrix.sum(), 1),
        "a copy": (lambda: matrix + 1, 2),  # read, and written
        "a product with its rows": (lambda: row @ matrix.T, 1),
        "a product with its columns": (lambda: column @ matrix, 1),
    }
    found = {}
    for name, (run, passes) in ways.items():
        mx.eval(run())
        best = math.inf
        for _ in range(rounds):
            started = time.perf_counter()
            mx.eval(run())
            best = min(best, time.perf_counter() - started)
        found[name] = passes * matrix.nbytes / best
    return found


def available_memory() -> int:
    """Return the bytes that a model may take here."""
    free = mx.device_info().get("free_memory")  # of a CUDA device
    if isinstance(free, int) and free > 0:
        return free
    meminfo = Path("/proc/meminfo")
    if runs_on_linux_cpu() and meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return describe_machine().memory_bytes


def is_compiled() -> bool:
    """Whether a decoding step goes through mx.compile here."""
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    return on_gpu and os.environ.get("MLX_DISABLE_COMPILE") is None


# Models --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Form:
    """What weights are while they are computed with.

    Attributes:
        dtype: of all that is not packed, and of what is computed.
        packings: of the quantized ones, by CoreNet name; none where that is widened.
    """

    dtype: mx.Dtype
    packings: Mapping[str, Packing]

    @property
    def key(self) -> tuple[str, frozenset[tuple[str, Packing]]]:
        """What two forms have in common that are computed alike."""
        return str(self.dtype), frozenset(self.packings.items())

    def __str__(self) -> str:
        return ("packed, " if self.packings else "") + spell_dtype(self.dtype)


def choose_form(subject: Subject, bits: int) -> Form | None:
    """Return the form in which `bits` are computed with here, as loading chooses it.

    None where no group of weights that MLX has divides the model's rows.
    """
    stored, packings = MADE_DTYPE, dict[str, Packing]()
    if subject.folder is not None:
        stored = stored_dtype(subject.folder)
    if subject.folder is not None and bits == subject.bits:
        packings = dict(subject.folder.packings)
    else:
        stored = MADE_DTYPE if stored == mx.float32 else stored
        if bits < 8 * stored.size:
            group = _choose_group(subject.config)
            if group is None:
                return None
            chosen = Quantization(bits=bits, group_size=group)
            packings = chosen.packings(subject.config)
    dtype = compute_dtype(stored)
    return Form(dtype, packings if dtype == stored else {})


def _choose_group(config: OpenELMConfig) -> int | None:
    widths = [shape[1] for shape in config.tensor_shapes().values() if len(shape) == 2]
    return next(
        (size for size in GROUP_SIZES if all(width % size == 0 for width in widths)),
        None,
    )


def _find_obstacle(case: Case, form: Form | None, same: int | None) -> str | None:
    """Return why a case is not measured, if there is a reason.

    Args:
        same: the bits of a case that computes the same, if one was measured.
    """
    if form is None:
        sizes = ", ".join(map(str, sorted(GROUP_SIZES)))
        return f"no group of {sizes} weights divides its rows"
    if same is not None:
        return f"computed in {form} here, as {same} bits are"
    needed, free = reckon_memory(case, form), available_memory()
    if needed > free:
        return f"takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return None


def reckon_memory(case: Case, form: Form) -> int:
    """Return about how many bytes a case takes: weights, cache, and work on a chunk."""
    config, size = case.subject.config, form.dtype.size
    weights = 0
    for name, shape in config.tensor_shapes().items():
        packing = form.packings.get(name)
        if packing is None:
            weights += math.prod(shape) * size
            continue
        for suffix, part in packing.part_shapes(shape).items():
            weights += math.prod(part) * (4 if suffix == "weight" else size)
    if case.subject.folder is not None and not (case.as_stored and form.packings):
        tensors = case.subject.folder.tensors.values()
        weights += max(tensor.num_bytes for tensor in tensors)  # one is read, and cast
    cache = case.batch * case.context * kv_bytes_per_token(config, form.dtype)
    chunk = min(case.prompt_tokens, PREFILL_CHUNK)
    tokens = case.batch * chunk
    scores = 2 * max(config.num_query_heads) * case.context
    work = tokens * (6 * max(config.ffn_dims) + 8 * config.model_dim + scores) * size
    logits = 4 * case.batch * config.vocab_size * size
    # A cache that grows is there twice for a moment.
    return int(weights + 2 * cache + work + logits)


def kv_bytes_per_token(config: OpenELMConfig, dtype: mx.Dtype) -> int:
    """Return the bytes of a token's keys and values in all layers."""
    return 2 * sum(config.num_kv_heads) * config.head_dim * dtype.size


def count_step_bytes(model: OpenELM, batch: int, attended: float) -> float:
    """Return the bytes that a decoding step of `batch` sequences must read.

    Every weight once, and each sequence's keys and values. Of an embedding that is not
    the output head as well, only a row for each sequence.

    Args:
        attended: tokens whose keys and values a sequence has.
    """
    config = model.config
    table = to_module(EMBEDDING) + "."
    read = 0.0
    for name, array in dict(tree_flatten(model.parameters())).items():
        looked_up = not config.share_input_output_layers and name.startswith(table)
        if looked_up and array.shape[0] == config.vocab_size:
            read += min(batch / config.vocab_size, 1) * array.nbytes
        else:
            read += array.nbytes
    dtype = model.transformer.norm.weight.dtype
    return read + batch * attended * kv_bytes_per_token(config, dtype)


def load_subject(
    subject: Subject,
    bits: int,
    form: Form,
    on_note: Callable[[str], None] = lambda note: None,
) -> OpenELM:
    """Return the model in this form, ready to run."""
    if subject.folder is None:
        return make_model(subject.config, form)
    if bits == subject.bits:
        model = load_model(subject.folder)
    else:
        model = load_model(subject.folder, form.dtype)
        make_quantized(model, form.packings)
        mx.eval(model.parameters())
    if subject.adapter is not None:
        for note in attach(model, subject.adapter):
            on_note(note)
    return model


def make_model(config: OpenELMConfig, form: Form) -> OpenELM:
    """Return a model of made weights: always the same million normals, scaled."""
    model = OpenELM(config)
    make_quantized(model, form.packings)
    normals = mx.random.normal((2**20,), key=mx.random.key(0)).astype(form.dtype)
    arrays: list[tuple[str, mx.array]] = []
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:  # a norm
            arrays.append((to_folder(name), mx.ones(shape, form.dtype)))
            continue
        count = math.prod(shape)
        times = math.ceil(count / normals.size)
        repeated = mx.broadcast_to(normals, (times, normals.size)).reshape(-1)
        weight = repeated[:count].reshape(shape) * shape[1] ** -0.5
        packing = form.packings.get(name)
        parts = packing.pack(weight) if packing else {"weight": weight}
        mx.eval(parts)
        arrays += [(f"{to_module(name)}.{part}", a) for part, a in parts.items()]
    model.load_weights(arrays)
    model.eval()
    mx.eval(model.parameters())
    return model
