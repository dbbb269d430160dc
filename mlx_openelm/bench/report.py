"""Results of `bench`: a figure, a row of the table, and the whole report."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_openelm.bench.machine import Bandwidth, is_compiled
from mlx_openelm.bench.published_speeds import PublishedSpeed
from mlx_openelm.device import Machine, describe_machine
from mlx_openelm.version import __version__


@dataclass(frozen=True, slots=True)
class Figure:
    """Median, minimum and maximum over the rounds."""

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
class Cell:
    """The results of one case.

    Attributes:
        made: whether the weights are random.
        computed_with: form of the weights during the computation.
        bytes_per_token: bytes read per token: those of a step divided by its batch.
        prompt_tps, generation_tps: tokens per second, of all sequences together.
        first_token_s: time to the first token with a loaded model, prompt included.
        shell_first_token_s: time from the start of a new process to the first byte of
            its answer to a short prompt.
        total_tps: prompt and new tokens per second; of `protocol` apple alone.
        bandwidth_share: bytes read per second divided by the measured bandwidth.
        skipped: the reason why the case was not measured, or None.
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
    total_tps: Figure | None = None
    first_token_s: Figure | None = None
    shell_first_token_s: Figure | None = None
    peak_memory_bytes: int | None = None
    bandwidth_share: Figure | None = None
    published: PublishedSpeed | None = None
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All results of one run.

    Attributes:
        protocol: "apple" (`apple_protocol`), or None.
        compiled: whether steps are compiled with mx.compile on this device.
        planned: number of requested cells; `cells` has fewer if the run was stopped.
    """

    version: str
    machine: Machine
    compiled: bool
    bandwidth: Bandwidth
    cells: tuple[Cell, ...]
    planned: int
    finished: bool
    protocol: str | None = None


def report_bench(
    bandwidth: Bandwidth,
    cells: Sequence[Cell],
    planned: int,
    *,
    finished: bool,
    protocol: str | None = None,
) -> BenchReport:
    """Return the report; a cell that is neither measured nor skipped is left out."""
    complete = tuple(cell for cell in cells if cell.rounds or cell.skipped)
    return BenchReport(
        version=__version__,
        machine=describe_machine(),
        compiled=is_compiled(),
        bandwidth=bandwidth,
        cells=complete,
        planned=planned,
        finished=finished,
        protocol=protocol,
    )
