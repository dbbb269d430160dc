"""What a run tells while it trains: events, metrics.jsonl, trackers."""

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

from mlx_openelm.reporting.trackers import Trackers
from mlx_openelm.storage.staging import replaced_file

METRICS = "metrics.jsonl"
SPIKE_WINDOW, SPIKE_LEAST = 100, 20  # losses that a new one is judged by
SPIKE_DEVIATIONS = 6.0


@dataclass(frozen=True, slots=True)
class Started:
    """What is about to be trained; counts are of one epoch, None where not known."""

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
        loss: cross-entropy; `z_loss` is what was added to it.
        tokens: learnt from so far.
        mfu: model FLOPs utilisation; None where the device's peak is not known.
        seconds_left: at the pace of this process so far.
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
    """The loss of one step stands far above the median of those before it."""

    step: int
    loss: float
    median: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Held-out text, windows each begun with BOS; `averaged`: of the final mean."""

    step: int
    nats_per_token: float
    bits_per_byte: float
    averaged: bool = False


@dataclass(frozen=True, slots=True)
class Sampled:
    """A prompt and how the model goes on, greedily."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Saved:
    """`dropped`: pieces of text left out by these processes, by reason."""

    step: int
    path: Path
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class Noted:
    """A sentence for the terminal alone."""

    text: str


Event = Started | Trained | Spiked | Evaluated | Sampled | Saved | Noted


class RunLog:
    """Writes each event to metrics.jsonl and to trackers, and hands it on."""

    def __init__(
        self,
        folder: Path,
        on_event: Callable[[Event], None],
        *,
        step: int,
        report_to: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin behind `step`: what a killed run told of later ones is dropped.

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
    """Leave what was told up to a step; a line cut by a death goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError):
            match json.loads(line):
                case {"averaged": True}:
                    pass
                case {"step": int(told)} if told > step:
                    pass
                case {}:
                    kept.append(line)
    with replaced_file(path) as staged:
        staged.write_text("".join(kept))


class Meter:
    """Sums up the steps since the last report, and keeps the time.

    Args:
        flops_per_position: of a position of the batch, padded or not.
        peak_flops: of all devices; None: not known.
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
        """Count a step; return what to flag.

        A loss is flagged above the median of the last 100 steps by 6 times the median
        distance from it (4 standard deviations, were they normal).
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
        """Return the means since the last report, and begin anew."""
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
        """Leave the time of this block out."""
        begun = time.perf_counter()
        yield
        elapsed = time.perf_counter() - begun
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
