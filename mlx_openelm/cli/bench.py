"""The command that measures speed: `bench`."""

import os
from collections.abc import Sequence
from enum import StrEnum
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
    optional_path,
)
from mlx_openelm.errors import OpenELMError
from mlx_openelm.options import OUTPUT_PANEL

WORKLOAD = "Workload"  # a heading in --help


class Against(StrEnum):
    """A program to compare with."""

    MLX_LM = "mlx-lm"


def bench_command(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model: demo, a folder, or a Hub id; repeatable.", show_default="demo"
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="Model of this size (270M, 450M, 1.1B or 3B) with random weights, on "
            "whose values speed does not depend; repeatable."
        ),
    ] = None,
    bits: Annotated[
        list[str] | None,
        typer.Option(
            help="Bits of the weights: 16, 8, 4, or a list such as 16,8,4; repeatable.",
            show_default="as stored",
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Published benchmark to repeat: apple, for --size and --bits 16 or 4, "
            "beside Apple's figures.",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            help="Batch size; repeatable.", show_default="1", rich_help_panel=WORKLOAD
        ),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Length of prompt and answer in tokens; repeatable.",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Length of the prompt in tokens.",
            show_default="512, or less in a short context",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "-m",
            "--max-tokens",
            help="Number of tokens to generate.",
            show_default="64",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            help="Number of rounds, whose median is reported.", rich_help_panel=WORKLOAD
        ),
    ] = 3,
    adapter_path: Adapter = None,
    against: Annotated[
        Against | None,
        typer.Option(
            help="Compare with this program on the same weights: decoding, prompt, "
            "start, LoRA and conversion, in alternating rounds.",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option(help="Draw a chart (.svg).", rich_help_panel=OUTPUT_PANEL),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Measure speed and memory on this machine.

    Reports prompt and generated tokens per second, the time to the first token, peak
    memory, and the share of this machine's memory bandwidth. --protocol apple repeats
    the benchmark whose results Apple has published.
    """
    console = Console(quiet=quiet)
    if adapter_path is not None and (size or len(model or ()) > 1):
        raise OpenELMError(
            "An adapter belongs to one model; use --adapter-path with one --model, or "
            "without --model for the adapter's own base."
        )
    if protocol not in (None, "apple"):
        raise OpenELMError(
            f"--protocol is {protocol!r}; choose apple, or leave it out."
        )
    fixed = {
        "--model": model,
        "--adapter-path": adapter_path,
        "--batch": batch,
        "--context": context,
        "--prompt-tokens": prompt_tokens,
        "--max-tokens": max_tokens,
        "--against": against,
    }
    for flag, value in fixed.items():
        if protocol == "apple" and value is not None:
            raise OpenELMError(
                f"--protocol apple sets its own workload; leave out {flag}."
            )
    check_report_file(chart, "--chart", ".svg")
    if against is not None:
        for flag, given in (
            *(("--size", size), ("--bits", bits), ("--batch", batch)),
            *(("--context", context), ("--adapter-path", adapter_path)),
        ):
            if given:
                raise typer.BadParameter(
                    f"cannot be used with {flag}", param_hint="--against"
                )
        if len(model or ()) > 1:
            raise OpenELMError("--against compares one model; give one --model.")
        name = next(iter(model or ()), None) or os.environ.get(MODEL_VARIABLE) or None
        _compare(
            console,
            name,
            prompt_tokens=prompt_tokens,
            new_tokens=max_tokens,
            rounds=rounds,
            chart=chart,
            as_json=as_json,
            offline=offline,
        )
        return
    numbers = _read_bits(bits or ())
    from mlx_openelm.bench.apple_protocol import measure_apple_cases, plan_apple_cases
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
    names: list[str | None] = list(dict.fromkeys(model or ()))
    if protocol == "apple":
        cases = plan_apple_cases(size or (), numbers)
    else:
        random = [make_subject(name) for name in dict.fromkeys(size or ())]
        adapter = optional_path(adapter_path)
        if not names and not random:
            names = [os.environ.get(MODEL_VARIABLE) or None]
        opened = [open_subject(name, adapter, offline=offline) for name in names]
        for folder in filter(None, (subject.folder for subject in opened)):
            for note in folder.notes:
                console.note(note)
        cases = plan_cases([*opened, *random], workload)
        if names == [None] and adapter is None:
            console.note(
                "[the built-in demo model; --model NAME or --size 270M uses another]"
            )

    cells: dict[int, Cell] = {}
    stopped: BaseException | None = None
    console.note("[measuring the memory bandwidth]")
    bandwidth = measure_bandwidth()
    try:
        with console.progress("Measuring") as progress:
            measuring = (
                measure_apple_cases(cases, rounds)
                if protocol == "apple"
                else measure_cases(cases, bandwidth, rounds, console.note)
            )
            for number, cell in measuring:
                cells[number] = cell
                done = sum(rounds if c.skipped else c.rounds for c in cells.values())
                progress.update(done, rounds * len(cases), "rounds")
    except (KeyboardInterrupt, SystemExit, OpenELMError) as error:
        stopped = error  # the finished cells are shown anyway
    measured = [cells[number] for number in sorted(cells)]
    report = report_bench(
        bandwidth,
        measured,
        len(cases),
        finished=stopped is None,
        protocol=protocol,
    )
    if stopped is not None and not any(cell.rounds for cell in report.cells):
        raise stopped
    from mlx_openelm.cli.views.bench import draw_bench, show_bench

    console.answer_report(report, show_bench, as_json=as_json)
    if chart is not None:
        from mlx_openelm.storage.staging import staged_file

        with staged_file(chart) as part:
            part.write_text(draw_bench(report), encoding="utf-8")
        console.note(f"Chart: {chart}")
    if stopped is not None:
        raise stopped
    if not any(cell.rounds for cell in report.cells):
        raise OpenELMError("Nothing was measured; the table has the reasons.")


def _compare(
    console: Console,
    name: str | None,
    *,
    prompt_tokens: int | None,
    new_tokens: int | None,
    rounds: int,
    chart: Path | None,
    as_json: bool,
    offline: bool,
) -> None:
    """Compare with mlx-lm and show the report."""
    from mlx_openelm.bench.against import compare_with_mlx_lm
    from mlx_openelm.bench.plan import Workload, open_subject, plan_cases
    from mlx_openelm.cli.views.against import draw_against, show_against

    subject = open_subject(name, offline=offline)
    assert subject.folder is not None
    workload = Workload(
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds
    )
    (case,) = plan_cases([subject], workload)
    report = compare_with_mlx_lm(
        subject.folder,
        prompt_tokens=case.prompt_tokens,
        new_tokens=case.new_tokens,
        rounds=rounds,
        on_step=lambda step: console.note(f"measuring: {step} ..."),
    )
    console.answer_report(report, show_against, as_json=as_json)
    if chart is not None:
        from mlx_openelm.storage.staging import staged_file

        with staged_file(chart) as part:
            part.write_text(draw_against(report), encoding="utf-8")
        console.note(f"Chart: {chart}")


def _read_bits(texts: Sequence[str]) -> tuple[int, ...]:
    """Parse the values of --bits, such as "16,8" and "4"."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    try:
        return tuple(map(int, parts))
    except ValueError as error:
        raise OpenELMError(
            f"--bits is {','.join(texts)}; give numbers such as 16,8,4."
        ) from error
