"""The report of `bench --against` as a table and as a picture."""

from typing import TYPE_CHECKING

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.views.bench import show_number

if TYPE_CHECKING:
    from mlx_openelm.bench.against import AgainstReport, Comparison
    from mlx_openelm.bench.report import Figure

NOTES = (
    "Ratio: how many times faster mlx-openelm is; the median of the rounds' pairs, and "
    "their lowest and highest.",
    "Both compute with the same weights, token ids and dtype, each run in a new "
    "process; rounds alternate.",
)


def show_against(console: Console, report: "AgainstReport") -> None:
    """Print the machine, both speeds and their ratio, and what they mean."""
    from rich.table import Table

    table = Table("", "unit", "mlx-openelm", report.against, "ratio", "", box=None)
    for measure in report.measures:
        ratio = measure.ratio
        table.add_row(
            measure.name,
            measure.unit,
            _median(measure.ours),
            _median(measure.theirs),
            "-" if ratio is None else f"{ratio.median:.2f}",
            measure.problem or _spread(measure),
        )
    machine = report.machine
    console.answer_facts(
        [
            ("mlx-openelm", f"{report.version}, MLX {machine.mlx}"),
            ("machine", f"{machine.system}, {machine.device}"),
            ("model", f"{report.model}, computed in {report.computed_with}"),
            ("tokens", f"prompt {report.prompt_tokens}, new {report.new_tokens}"),
            ("rounds", str(report.rounds)),
        ]
    )
    console.answer("")
    console.answer_table(table)
    console.answer("")
    for note in NOTES:
        console.answer(note)


def draw_against(report: "AgainstReport") -> str:
    """Return the ratios as an SVG document."""
    from mlx_openelm.reporting.pictures import Measure, SpeedRow, draw_speeds

    rows = []
    for measure in report.measures:
        ratio = measure.ratio
        shown = None
        if ratio is not None:
            label = f"{ratio.median:.2f}"
            shown = Measure(ratio.median, ratio.low, ratio.high, label)
        label = f"{_median(measure.ours)} and {_median(measure.theirs)} {measure.unit}"
        rows.append(SpeedRow(measure.name, label, shown, note=measure.problem))
    return draw_speeds(
        rows,
        title=f"mlx-openelm and {report.against}: {report.model}",
        subtitle=f"{report.machine.device}, {report.machine.system}",
        notes=list(NOTES),
        unit="times as fast as mlx-lm",
    )


def _median(figure: "Figure | None") -> str:
    return "-" if figure is None else show_number(figure.median)


def _spread(measure: "Comparison") -> str:
    ratio = measure.ratio
    return "" if ratio is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
