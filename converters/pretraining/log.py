"""Progress of a run: events, metrics.jsonl, trackers."""

import contextlib
import dataclasses
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_openelm.input_files import parse_json
from mlx_openelm.reporting.run_history import read_step
from mlx_openelm.reporting.trackers import Trackers
from mlx_openelm.storage.staging import replaced_file

METRICS = "metrics.jsonl"
SPIKE_WINDOW, SPIKE_LEAST = 100, 20  # number of previous losses to compare with
SPIKE_DEVIATIONS = 6.0


@dataclass(frozen=True, slots=True)
class Started:
    """Sizes of the run, before its first step; counts are per epoch, None: unknown."""

    num_parameters: int
    num_documents: int | None
    num_sequences: int | None
    num_tokens: int | None
    dropped: dict[str, int]
    steps: int
    first_step: int
    processes: int = 1


@dataclass(frozen=True, slots=True)
class Trained:
    """Means since the last report, in nats per token; the norm is the last step's.

    Attributes:
        loss: cross-entropy, without `z_loss`.
        tokens: targets so far.
        mfu: model FLOPs utilisation; None if the device's peak is unknown.
        seconds_left: estimated from the mean speed of this process.
    """

    step: int
    loss: float
    z_loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    mfu: float | None
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Spiked:
    """The loss of a step is far above the median of the previous ones."""

    step: int
    loss: float
    median: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Loss on held-out text; `averaged`: of the averaged final weights."""

    step: int
    nats_per_token: float
    bits_per_byte: float
    averaged: bool = False


@dataclass(frozen=True, slots=True)
class Sampled:
    """A prompt and the model's greedy continuation."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint was written; `dropped`: number of dropped pieces by reason."""

    step: int
    path: Path
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class Noted:
    """A sentence for the user."""

    text: str


Event = Started | Trained | Spiked | Evaluated | Sampled | Saved | Noted


class RunLog:
    """Writes events to metrics.jsonl and trackers, and passes them to `on_event`."""

    def __init__(
        self,
        folder: Path,
        on_event: Callable[[Event], None],
        *,
        step: int,
        report_to: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the log after `step`; later records of a killed run are removed.

        Raises:
            OpenELMError: a tracker's package is not installed, or it cannot start.
        """
        self._path, self._on_event = folder / METRICS, on_event
        _drop_after(self._path, step)
        self._trackers = Trackers(
            report_to,
            folder,
            config=config or {},
            first_step=step,
            on_failure=lambda text: on_event(Noted(text)),
        )

    def write(self, event: Event) -> None:
        fields = {k: v for k, v in dataclasses.asdict(event).items() if v is not None}
        record = {"event": type(event).__name__.lower(), **fields}
        with self._path.open("a") as metrics:
            metrics.write(json.dumps(record, default=str) + "\n")
        self._trackers.log(record["event"], fields)
        if isinstance(event, Sampled):
            self._trackers.log_text(event.step, "sampled", event.prompt + event.text)
        self._on_event(event)

    def close(self) -> None:
        self._trackers.close()


def _drop_after(path: Path, step: int) -> None:
    """Remove the records after a step, and a truncated last line."""
    if not path.exists():
        return
    kept = [
        json.dumps(row) + "\n"
        for row in read_metrics(path)
        if row.get("averaged") is not True and read_step(row) <= step
    ]
    with replaced_file(path) as staged:
        staged.write_text("".join(kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, without incomplete lines."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict):
                records.append(record)
    return records


class Meter:
    """Accumulates losses, tokens and time since the last report.

    Args:
        flops_per_position: of a position of the batch, padding included.
        peak_flops: of all devices together; None if unknown.
    """

    def __init__(self, flops_per_position: float, peak_flops: float | None) -> None:
        self._flops, self._peak = flops_per_position, peak_flops
        self.tokens = 0
        self._losses: list[float] = []
        self._z_losses: list[float] = []
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._norm = 0.0
        self._restart()
        self._first, self._steps = self._since, 0

    def add(
        self,
        step: int,
        *,
        loss: float,
        z_loss: float,
        norm: float,
        tokens: int,
        positions: int,
    ) -> Spiked | None:
        """Add a step; return an event if its loss is a spike.

        A spike exceeds the median of the last 100 losses by 6 median absolute
        deviations (4 standard deviations of a normal distribution).
        """
        self._losses.append(loss)
        self._z_losses.append(z_loss)
        self._norm = norm
        self.tokens += tokens
        self._tokens += tokens
        self._positions += positions
        self._steps += 1
        spiked = None
        if len(self._recent) >= SPIKE_LEAST:
            median = statistics.median(self._recent)
            deviation = statistics.median(abs(x - median) for x in self._recent)
            if loss > median + SPIKE_DEVIATIONS * deviation:
                spiked = Spiked(step, loss, median)
        self._recent.append(loss)
        return spiked

    def report(self, step: int, steps: int, learning_rate: float) -> Trained:
        """Return the means since the last report, and reset them."""
        now = time.perf_counter()
        elapsed = now - self._since
        used = self._flops * self._positions / elapsed
        trained = Trained(
            step=step,
            loss=statistics.fmean(self._losses),
            z_loss=statistics.fmean(self._z_losses),
            learning_rate=learning_rate,
            gradient_norm=self._norm,
            tokens=self.tokens,
            tokens_per_second=self._tokens / elapsed,
            mfu=used / self._peak if self._peak else None,
            seconds_left=(now - self._first) / max(self._steps, 1) * (steps - step),
        )
        self._losses, self._z_losses = [], []
        self._restart()
        return trained

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of this block."""
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        self._since += elapsed
        self._first += elapsed

    def state(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "losses": self._losses,
            "z_losses": self._z_losses,
            "recent": list(self._recent),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.tokens = state["tokens"]
        self._losses, self._z_losses = list(state["losses"]), list(state["z_losses"])
        self._recent.extend(state["recent"])

    def _restart(self) -> None:
        self._since, self._tokens, self._positions = time.perf_counter(), 0, 0
