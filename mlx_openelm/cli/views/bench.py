"""The report of `bench` as a table and as a picture."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mlx_openelm.cli.console import Console

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_openelm.bench.machine import Bandwidth
    from mlx_openelm.bench.report import BenchReport, Cell, Figure
    from mlx_openelm.reporting.pictures import Measure, SpeedRow


def show_bench(console: Console, report: "BenchReport") -> None:
    """Print the machine, a table with a row for each cell, and explanations."""
    console.answer_facts(describe_setting(report))
    console.answer("")
    apple = report.protocol == "apple"
    console.answer_table(_table_apple(report) if apple else _table_default(report))
    console.answer("")
    for line in explain_bench(report):
        console.answer(line)


def _table_apple(report: "BenchReport") -> "Table":
    """Return the columns of the published table, with its figures after ours."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for header in (
        *("bits", "prompt\ntokens/s", "new\ntokens/s", "total\ntokens/s"),
        *("published\nprompt", "published\nnew", "published\ntotal", "peak\nMB"),
    ):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("")
    for cell in report.cells:
        published = ["-"] * 3
        if (speed := cell.published) is not None:
            rates = (speed.prompt_tps, speed.generation_tps, speed.total_tps)
            published = [show_number(rate) for rate in rates]
        table.add_row(
            cell.model,
            f"{cell.bits}\n{cell.computed_with}",
            _show_figure(cell.prompt_tps, 1),
            _show_figure(cell.generation_tps, 1),
            _show_figure(cell.total_tps, 1),
            *published,
            _show_megabytes(cell.peak_memory_bytes),
            f"not measured: {cell.skipped}" if cell.skipped else "",
        )
    return table


def _table_default(report: "BenchReport") -> "Table":
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
            f"not measured: {cell.skipped}" if cell.skipped else "",
        )
    return table


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
    if report.protocol == "apple":
        yield (
            "Apple's protocol: 36 prompt tokens and 1,024 new tokens, 8 evaluated "
            "together;\nprompt: of the first call, which is cold; total: all tokens "
            "over the whole time."
        )
    elif cells:
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
            f"Published: Apple's figures ({published.setting}), quoted from memory, "
            "UNVERIFIED."
        )
    if not report.finished:
        done = sum(cell.rounds > 0 for cell in report.cells)
        yield f"Stopped: {done} of {report.planned} cells were measured."


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
        name=cell.model + (", random weights" if cell.made else ""),
        label=", ".join([*label, f"{cell.context} tokens"]),
        speed=_measure(cell.generation_tps, show_number),
        bandwidth_share=_measure(cell.bandwidth_share, format_percent),
        published_speed=None if published is None else published.generation_tps,
        note=f"not measured: {cell.skipped}" if cell.skipped else "",
    )


def _measure(figure: "Figure | None", form: Callable[[float], str]) -> "Measure | None":
    from mlx_openelm.reporting.pictures import Measure

    if figure is None:
        return None
    return Measure(figure.median, figure.low, figure.high, form(figure.median))


def _picture_notes(report: "BenchReport") -> Iterator[str]:
    yield f"Memory bandwidth: {describe_bandwidth(report.bandwidth)}."
    yield "Bars: medians of the rounds; thin lines: minimum to maximum."
    if any(cell.made for cell in report.cells):
        yield "Random weights: speed does not depend on their values."
    for published in [c.published for c in report.cells if c.published is not None][:1]:
        yield (
            f"Dashed: Apple's figures ({published.setting}), quoted from memory, "
            "UNVERIFIED."
        )
