"""report.html of a run: written at its start, during training, and at its end."""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from converters.pretraining.checkpoints import AVERAGE, RECIPE, as_json
from converters.pretraining.compared_logs import read_compared_losses
from converters.pretraining.log import METRICS, Event, Trained, read_metrics
from converters.pretraining.recipe import PretrainRecipe
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.message_parts import describe_failure
from mlx_openelm.reporting.charts import Chart, Line, Mark, Point
from mlx_openelm.reporting.number_formats import (
    format_count,
    format_number,
    format_share,
)
from mlx_openelm.reporting.run_history import (
    Column,
    Pace,
    Row,
    group_samples,
    read_number,
    read_points,
    read_step,
    tabulate,
)
from mlx_openelm.reporting.training_report import (
    DataSummary,
    TrainingReport,
    render_training_report,
)
from mlx_openelm.storage.staging import replaced_file

PAGE = "report.html"
REFRESH_SECONDS = 60
MAX_SHARE = 0.002  # of the run's time, for writing the page; all processes wait
EXPECTED_SECONDS = 0.02  # of the first page with charts, which so comes after 10 s


class RunReport:
    """The page of a run, rewritten at intervals: a context manager.

    It is complete when the block is left, also by an exception. A page that cannot be
    written is noted, and the run continues.
    """

    def __init__(
        self,
        recipe: PretrainRecipe,
        config: OpenELMConfig,
        on_failure: Callable[[str], None],
    ) -> None:
        """Read the log to compare with.

        Raises:
            OpenELMError: it cannot be read.
        """
        self._recipe, self._config, self._on_failure = recipe, config, on_failure
        self._folder = Path(recipe.output)
        path = recipe.compare_log
        self._compared = [] if path is None else read_compared_losses(Path(path))
        self._pace = Pace(MAX_SHARE, EXPECTED_SECONDS)

    def __enter__(self) -> Self:
        self._write("running")
        return self

    def __call__(self, event: Event) -> None:
        if isinstance(event, Trained) and self._pace.allows():
            with self._pace:
                self._write("running")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._write("done")
        elif isinstance(error, Exception):
            self._write("failed", describe_failure(error))
        else:
            self._write("interrupted")

    def _write(self, state: str, failure: str = "") -> None:
        try:
            run = _Rows(read_metrics(self._folder / METRICS))
            page = render_training_report(self._describe(run, state, failure))
            with replaced_file(self._folder / PAGE) as staged:
                staged.write_text(page, encoding="utf-8")
        except Exception as error:  # any error: the report must not stop the run
            self._on_failure(f"The report could not be written: {error}.")

    def _describe(self, run: "_Rows", state: str, failure: str) -> TrainingReport:
        import yaml

        steps = f"{run.last_step:,.0f} of {self._recipe.steps:,} steps"
        status = {
            "running": f"Training: {steps} at {time.strftime('%H:%M:%S')}. This page "
            f"reloads every {REFRESH_SECONDS} seconds until the run ends.",
            "done": f"{steps} were trained.",
            "interrupted": f"Interrupted after {steps}; --resume continues the run.",
            "failed": f"Failed after {steps}: {failure}",
        }[state]
        if run.resumed:
            status += f" Resumed at step {_list_steps(run.resumed)}."
        if run.spikes:
            status += f" Loss spikes at step {_list_steps(run.spikes)}."
        facts = dict(_list_facts(run, self._config))
        compared = [p for p in self._compared if p[0] <= max(run.last_step, 1)]
        if compared and run.trained:
            facts[f"loss in {self._compared_name}"] = _compare(run, compared)
        values = as_json(self._recipe)
        return TrainingReport(
            title=f"{self._folder.resolve().name}: pre-training of an OpenELM",
            result=_describe_result(run),
            status=status,
            refresh_seconds=REFRESH_SECONDS if state == "running" else None,
            facts=facts,
            charts=[self._loss_chart(run, compared), *_small_charts(run)],
            numbers=_tabulate(run, compared) if run.trained else None,
            skipped=(),
            samples=list(group_samples(run.of("sampled"))),
            data=_summarize(run),
            commands=list(self._list_commands()),
            recipe=yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
            recipe_file=RECIPE,
        )

    @property
    def _compared_name(self) -> str:
        return Path(self._recipe.compare_log or "").name

    def _loss_chart(self, run: "_Rows", compared: list[Point]) -> Chart:
        lines = [Line("training", read_points(run.trained, "loss"), "blue", trend=True)]
        if run.heldout:
            points = read_points(run.heldout, "nats_per_token")
            lines.append(Line("held-out", points, "orange", dotted=True))
        if compared:
            lines.append(Line(self._compared_name, compared, "green"))
        return Chart(
            name="loss",
            title="Loss, nats per token",
            lines=lines,
            last_step=run.last_step,
            format=format_number,
            marks=[
                Mark("resumed", run.resumed, "muted", "dashed"),
                Mark("loss spike", run.spikes, "red", "dotted"),
            ],
        )

    def _list_commands(self) -> Iterator[tuple[str, str]]:
        average = self._folder / AVERAGE
        if average.is_file():
            convert = shlex.quote(str(average))
            yield "Convert the result", f"mlx-openelm convert {convert}"
        recipe = shlex.quote(str(self._folder / RECIPE))
        again = f"mlx-openelm pretrain -c {recipe} --resume auto"
        yield "Start or resume the run", again


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of metrics.jsonl."""

    rows: Sequence[Row]

    def of(self, event: str) -> list[Row]:
        return [row for row in self.rows if row.get("event") == event]

    @property
    def trained(self) -> list[Row]:
        return self.of("trained")

    @property
    def heldout(self) -> list[Row]:
        """Evaluations during training, without that of the averaged weights."""
        return [row for row in self.of("evaluated") if not row.get("averaged")]

    @property
    def averaged(self) -> Row | None:
        rows = [row for row in self.of("evaluated") if row.get("averaged")]
        return rows[-1] if rows else None

    @property
    def spikes(self) -> list[float]:
        return [read_step(row) for row in self.of("spiked")]

    @property
    def resumed(self) -> list[float]:
        firsts = [read_number(row, "first_step") for row in self.of("started")]
        return [step for step in firsts if step]

    @property
    def last_step(self) -> float:
        known = [*map(read_step, self.rows), *self.resumed]
        return max(known, default=0.0)


def _describe_result(run: _Rows) -> str:
    if not run.trained:
        return "Training has started."
    loss = read_number(run.trained[-1], "loss")
    parts = [
        "Training loss not finite" if loss is None else f"Training loss {loss:.3f}"
    ]
    for name, row in (
        ("held-out", run.heldout[-1] if run.heldout else None),
        ("held-out, mean of the last checkpoints", run.averaged),
    ):
        nats = None if row is None else read_number(row, "nats_per_token")
        if nats is not None:
            parts.append(f"{name} {nats:.3f}")
    return f"{', '.join(parts)} nats per token."


def _list_steps(steps: Sequence[float], most: int = 10) -> str:
    more = f" and {len(steps) - most:,} earlier" if len(steps) > most else ""
    return ", ".join(f"{step:,.0f}" for step in steps[-most:]) + more


def _list_facts(run: _Rows, config: OpenELMConfig) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{config.num_parameters:,}"
    for row in run.of("started")[-1:]:
        yield "processes", f"{row.get('processes', 1):,}"
    for row in run.trained[-1:]:
        for name, key, form in (
            ("trained tokens", "tokens", format_count),
            ("tokens per second", "tokens_per_second", format_count),
            ("share of peak FLOP/s", "mfu", format_share),
            ("hours left", "seconds_left", lambda s: f"{s / 3600:,.1f}"),
        ):
            value = read_number(row, key)
            if value is not None:
                yield name, form(value)
    yield "loss spikes", f"{len(run.spikes):,}"
    for row in run.heldout[-1:]:
        yield "held-out bits per byte", f"{row.get('bits_per_byte', 0):.4f}"


def _compare(run: _Rows, compared: Sequence[Point]) -> str:
    """Return the last loss of the other run, and ours at the report before it."""
    step, theirs = compared[-1]
    before = [row for row in run.trained if read_step(row) <= step] or run.trained[:1]
    ours = read_number(before[-1], "loss")
    here = "" if ours is None else f"; here {ours:.3f} at {read_step(before[-1]):,.0f}"
    return f"{theirs:.3f} at step {step:,.0f}{here}"


def _small_charts(run: _Rows) -> Iterator[Chart]:
    for key, title, form, from_zero in (
        ("tokens_per_second", "Tokens per second", format_count, True),
        ("mfu", "Share of the devices' peak FLOP/s", format_share, True),
        ("learning_rate", "Learning rate", format_number, True),
        ("gradient_norm", "Gradient norm", format_number, False),
        ("z_loss", "z-loss", format_number, False),
    ):
        line = Line("training", read_points(run.trained, key), "blue")
        yield Chart(key, title, [line], run.last_step, form, from_zero=from_zero)
    line = Line("held-out", read_points(run.heldout, "bits_per_byte"), "orange")
    yield Chart(
        "bits_per_byte", "Held-out bits per byte", [line], run.last_step, format_number
    )


_COLUMNS: Sequence[Column] = (
    ("loss", "loss", lambda v: f"{v:.4f}"),
    ("nats_per_token", "held-out", lambda v: f"{v:.4f}"),
    ("compared", "compared", lambda v: f"{v:.4f}"),
    ("z_loss", "z-loss", format_number),
    ("learning_rate", "learning rate", format_number),
    ("gradient_norm", "gradient norm", format_number),
    ("tokens", "tokens", format_count),
    ("tokens_per_second", "tokens/s", format_count),
    ("mfu", "share of peak", format_share),
)


def _tabulate(run: _Rows, compared: Sequence[Point]) -> Any:
    rows: dict[float, dict[str, Any]] = {}
    for row in (*run.heldout, *run.trained):
        rows.setdefault(read_step(row), {}).update(row)
    for step, loss in compared:
        rows.setdefault(step, {})["compared"] = loss
    return tabulate(rows, _COLUMNS)


def _summarize(run: _Rows) -> DataSummary | None:
    """Return the sizes of the data, where they are known, and what was dropped."""
    facts: dict[str, str] = {}
    for row in run.of("started")[-1:]:
        for name in ("documents", "sequences", "tokens"):
            if (count := read_number(row, f"num_{name}")) is not None:
                facts[f"{name} an epoch"] = f"{count:,.0f}"
    dropped = [row["dropped"] for row in run.rows if row.get("dropped")]
    if dropped:
        facts |= {f"dropped: {why}": f"{n:,}" for why, n in dropped[-1].items()}
    notes = [str(row.get("text", "")) for row in run.of("noted")]
    return DataSummary(notes, facts, [], []) if facts or notes else None
