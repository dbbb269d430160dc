"""The report of `bench` as a table and as a picture."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mlx_openelm.cli.console import Console

if TYPE_CHECKING:
    from mlx_openelm.bench.machine import Bandwidth
    from mlx_openelm.bench.report import BenchReport, Cell, Figure
    from mlx_openelm.reporting.pictures import Measure, SpeedRow


def show_bench(console: Console, report: "BenchReport") -> None:
    """Print the machine, a table with a row for each cell, and explanations."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for header in (
        *("bits", "batch", "context", "prompt\ntokens/s", "new\ntokens/s"),
        *("first token\nwarm, s", "from the\nshell, s", "peak\nMB"),
        *("read\nMB/token", "share of\nbandwidth"),
    ):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("")
    for cell in report.cells:
        table.add_row(
            cell.model + ("\nrandom weights" if cell.made else ""),
            f"{cell.bits}\n{cell.computed_with}",
            str(cell.batch),
            f"{cell.context}",
            _show_figure(cell.prompt_tps, 1),
            _show_figure(cell.generation_tps, 1),
            _show_figure(cell.first_token_s, 1),
            _show_figure(cell.shell_first_token_s, 1),
            _show_megabytes(cell.peak_memory_bytes),
            _show_megabytes(cell.bytes_per_token),
            _show_figure(cell.bandwidth_share, 100, " %"),
            describe_cell(cell),
        )
    console.answer_facts(describe_setting(report))
    console.answer("")
    console.answer_table(table)
    console.answer("")
    for line in explain_bench(report):
        console.answer(line)


def describe_setting(report: "BenchReport") -> Iterator[tuple[str, str]]:
    """Yield the facts above the table, as names and values."""
    machine = report.machine
    steps = "compiled" if report.compiled else "not compiled"
    yield "mlx-openelm", f"{report.version}, MLX {machine.mlx}, Python {machine.python}"
    memory = f"{machine.memory_bytes / 1e9:.1f} GB"
    yield "machine", f"{machine.system}, {machine.device}, {memory}"
    yield "computed with", f"{machine.blas}, steps {steps}"
    yield "memory bandwidth", describe_bandwidth(report.bandwidth)


def describe_bandwidth(bandwidth: "Bandwidth") -> str:
    """Return the bandwidth and how it was measured."""
    others = ", ".join(
        f"by {way} {show_number(speed / 1e9)}"
        for way, speed in bandwidth.ways.items()
        if way != bandwidth.way
    )
    return (
        f"{show_number(bandwidth.bytes_per_second / 1e9)} GB/s: "
        f"{bandwidth.num_bytes / 1e6:.0f} MB by {bandwidth.way} in MLX, best of "
        f"{bandwidth.rounds} "
        f"({others})"
    )


def explain_bench(report: "BenchReport") -> Iterator[str]:
    """Yield the notes under the table."""
    cells = [cell for cell in report.cells if cell.rounds]
    if any(cell.rounds > 1 for cell in cells):
        most = max(cell.rounds for cell in cells)
        yield f"Medians of {most} rounds, above the minimum and the maximum."
    if any(cell.made for cell in report.cells):
        yield "Random weights: speed does not depend on their values."
    if cells:
        yield (
            "Read: bytes read from memory for each new token (weights, keys and "
            "values).\n"
            "Share of bandwidth: the rate of these reads over the memory bandwidth."
        )
    shares = [c.bandwidth_share.median for c in cells if c.bandwidth_share is not None]
    if any(share > 1 for share in shares):
        yield "A share above 100 %: much of the model is in the processor's cache."
    if any(cell.shell_first_token_s for cell in cells):
        yield (
            "From the shell: time from the start of a new process to its first byte of "
            "output, with a short prompt."
        )
    for published in [c.published for c in report.cells if c.published is not None][:1]:
        yield (
            f"Published: Apple's figures ({published.setting}), quoted from memory and "
            "unverified."
        )
    if not report.finished:
        done = sum(cell.rounds > 0 for cell in report.cells)
        yield f"Stopped: {done} of {report.planned} cells were measured."


def describe_cell(cell: "Cell") -> str:
    """Return why a cell was not measured, or its published speed."""
    if cell.skipped is not None:
        return f"not measured: {cell.skipped}"
    if cell.published is None:
        return ""
    return (
        f"published, unverified: prompt {cell.published.prompt_tps:.0f}, new "
        f"{cell.published.generation_tps:.0f}"
    )


def _show_figure(figure: "Figure | None", factor: float, unit: str = "") -> str:
    if figure is None:
        return "-"
    median = f"{show_number(figure.median * factor)}{unit}"
    if figure.low == figure.high:
        return median
    low, high = show_number(figure.low * factor), show_number(figure.high * factor)
    return f"{median}\n{low}-{high}"


def show_number(value: float) -> str:
    """Return a number in three digits, without an exponent."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _show_megabytes(count: float | None) -> str:
    return "-" if count is None else show_number(count / 1e6)


# The picture ---------------------------------------------------------------------


def draw_bench(report: "BenchReport") -> str:
    """Return the report as an SVG document."""
    from mlx_openelm.reporting.pictures import draw_speeds

    return draw_speeds(
        [_picture_row(cell) for cell in report.cells],
        title="Speed of OpenELM on this machine",
        subtitle=f"{report.machine.device}, {report.machine.system}",
        notes=list(_picture_notes(report)),
    )


def _picture_row(cell: "Cell") -> "SpeedRow":
    from mlx_openelm.reporting.pictures import SpeedRow, format_percent

    label = [f"{cell.bits} bits in {cell.computed_with.removeprefix('packed, ')}"]
    label += [f"batch {cell.batch}"] if cell.batch > 1 else []
    published = cell.published
    return SpeedRow(
        name=cell.model + (", made weights" if cell.made else ""),
        label=", ".join([*label, f"{cell.context} tokens"]),
        speed=_measure(cell.generation_tps, show_number),
        bandwidth_share=_measure(cell.bandwidth_share, format_percent),
        published_speed=None if published is None else published.generation_tps,
        note=describe_cell(cell),
    )


def _measure(figure: "Figure | None", form: Callable[[float], str]) -> "Measure | None":
    from mlx_openelm.reporting.pictures import Measure

    if figure is None:
        return None
    return Measure(figure.median, figure.low, figure.high, form(figure.median))


def _picture_notes(report: "BenchReport") -> Iterator[str]:
    yield f"Memory is read at {describe_bandwidth(report.bandwidth)}."
    yield "Bars: medians of the rounds; the thin line goes from least to largest."
    if any(cell.made for cell in report.cells):
        yield "Made weights: speed does not depend on their values."
    for published in [c.published for c in report.cells if c.published is not None][:1]:
        yield (
            f"Dashed: published by Apple ({published.setting}), recalled, unverified."
        )
