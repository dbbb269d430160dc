"""The report of `selfcheck` as tables."""

import dataclasses
from typing import TYPE_CHECKING

from mlx_openelm.cli.console import Console

if TYPE_CHECKING:
    from mlx_openelm.bench.selfcheck import SelfCheck
    from mlx_openelm.bench.tune import TuneReport
    from mlx_openelm.tuning import Tuning


def show_selfcheck(console: Console, report: "SelfCheck") -> None:
    """Print the machine, a table of the checks, and the demo model's text."""
    from rich.table import Table

    machine = dataclasses.asdict(report.machine)
    machine["memory_bytes"] = f"{report.machine.memory_bytes / 1e9:.1f} GB"
    table = Table("check", "value", "limit", "", box=None)
    for check in report.checks:
        table.add_row(
            check.name,
            f"{check.value:.2g}",
            f"{check.limit:.2g}",
            "ok" if check.passed else "FAILED",
        )
    console.answer_facts([("mlx-openelm", report.version), *machine.items()])
    console.answer("")
    console.answer_table(table)
    console.answer("")
    console.answer(report.text)


def show_tuning(console: Console, report: "TuneReport") -> None:
    """Print the machine, a table of the settings, and those that were chosen."""
    from rich.table import Table

    table = Table("setting", "tokens/s", "lowest", "bandwidth", "output", box=None)
    group = ""
    for trial in report.trials:
        if trial.group != group:
            group = trial.group
            table.add_row(f"[bold]{group}[/bold]")
        speed, share = trial.tokens_per_second, trial.bandwidth_share
        output = {None: "", True: "identical", False: "other"}[trial.identical]
        table.add_row(
            f"  {trial.setting}",
            "-" if speed is None else f"{speed.median:,.1f}",
            "-" if speed is None else f"{speed.low:,.1f}",
            "" if share is None else f"{share:.0%}",
            trial.reason or output,
        )
    console.answer_facts(
        [
            ("mlx-openelm", report.version),
            ("machine", f"{report.machine.system}, {report.machine.device}"),
            ("mlx", report.machine.mlx),
            ("model", report.model),
            ("memory bandwidth", f"{report.bandwidth / 1e9:.1f} GB/s"),
        ]
    )
    console.answer("")
    console.answer_table(table)
    console.answer("")
    console.answer(f"Chosen: {describe_tuning(report.chosen)}.")
    for line in (
        "The first setting of each group is the default. Another one is chosen if its "
        "output is identical",
        "and its median is above the best round of the default. TF32 is never changed.",
        "Bandwidth: the bytes that a step must read, a second, over the memory "
        "bandwidth.",
    ):
        console.answer(line)


def describe_tuning(tuning: "Tuning") -> str:
    """Return the settings that differ from the defaults, in words."""
    from mlx_openelm.tuning import DEFAULT

    changed = [
        f"{field.name} {getattr(tuning, field.name)}"
        for field in dataclasses.fields(tuning)
        if field.name != "environment"
        and getattr(tuning, field.name) != getattr(DEFAULT, field.name)
    ]
    changed += [f"{name}={value}" for name, value in tuning.environment.items()]
    return ", ".join(changed) or "the defaults"
