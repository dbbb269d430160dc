"""The command that measures speed: `bench`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import (
    MODEL_VARIABLE,
    Adapter,
    Json,
    Offline,
    Quiet,
    check_report_file,
    expand_path,
)
from mlx_openelm.errors import OpenELMError


def bench_command(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="demo, a model folder, or a Hub id; repeatable.", show_default="demo"
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="270M, 450M, 1.1B or 3B in made weights (speed does not depend on "
            "their values); repeatable."
        ),
    ] = None,
    bits: Annotated[
        list[str] | None,
        typer.Option(help="Of the weights: 16, 8, 4...; repeatable; as stored."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences at once; repeatable.")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of prompt and answer; repeatable."),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Default 512, or what there is room for.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("-m", "--max-tokens", help="New tokens; default 64."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="The median of so many.")] = 3,
    adapter_path: Adapter = None,
    chart: Annotated[
        Path | None, typer.Option(help="Draw a picture into this .svg file.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Measure speed on this machine, beside published figures.

    Prompt and new tokens per second, the time to the first token, memory, and the share
    of this machine's memory bandwidth; of the demo in seconds. --size 270M shows what
    Apple published beside it.
    """
    console = Console(quiet=quiet)
    if adapter_path is not None and (size or len(model or ()) > 1):
        raise OpenELMError(
            "An adapter belongs to one model; say --adapter-path with one --model, or "
            "with none for the adapter's own base."
        )
    chart = expand_path(chart)
    check_report_file(chart, "--chart", ".svg")
    numbers = _read_bits(bits or ())
    from mlx_openelm.bench.machine import measure_bandwidth
    from mlx_openelm.bench.measure import measure_cases
    from mlx_openelm.bench.plan import Workload, make_subject, open_subject, plan_cases
    from mlx_openelm.bench.report import Cell, report_bench

    workload = Workload(
        bits=numbers,
        batches=tuple(batch or (1,)),
        contexts=tuple(context or ()),
        prompt_tokens=prompt_tokens,
        new_tokens=max_tokens,
        rounds=rounds,
    )
    made = [make_subject(name) for name in dict.fromkeys(size or ())]
    adapter = expand_path(adapter_path)
    names: list[str | None] = list(dict.fromkeys(model or ()))
    if not names and not made:
        names = [os.environ.get(MODEL_VARIABLE) or None]
    opened = [open_subject(name, adapter, offline=offline) for name in names]
    cases = plan_cases([*opened, *made], workload)
    if names == [None] and adapter is None:
        console.note(
            "[the built-in demo model; --model NAME or --size 270M is another]"
        )

    cells: dict[int, Cell] = {}
    stopped: BaseException | None = None
    console.note("[how fast memory is read]")
    bandwidth = measure_bandwidth()
    try:
        with console.progress("Measuring") as progress:
            for number, cell in measure_cases(cases, bandwidth, rounds, console.note):
                cells[number] = cell
                done = sum(rounds if c.skipped else c.rounds for c in cells.values())
                progress.update(done, rounds * len(cases), "rounds")
    except (KeyboardInterrupt, SystemExit, OpenELMError) as error:
        stopped = error  # what was measured until then is shown all the same
    told = [cells[number] for number in sorted(cells)]
    report = report_bench(bandwidth, told, len(cases), finished=stopped is None)
    if stopped is not None and not any(cell.rounds for cell in report.cells):
        raise stopped
    from mlx_openelm.cli.views.bench import draw_bench, show_bench

    console.answer_report(report, show_bench, as_json=as_json)
    if chart is not None:
        from mlx_openelm.storage.staging import staged_file

        with staged_file(chart) as part:
            part.write_text(draw_bench(report), encoding="utf-8")
        console.note(f"Drawn in {chart}")
    if stopped is not None:
        raise stopped


def _read_bits(said: list[str] | tuple[str, ...]) -> tuple[int, ...]:
    """Return the numbers of "16,8" and "4", said once or several times."""
    parts = [part.strip() for text in said for part in text.split(",")]
    try:
        return tuple(map(int, parts))
    except ValueError as error:
        raise OpenELMError(
            f"--bits is {','.join(said)}; say numbers such as 16,8,4."
        ) from error
