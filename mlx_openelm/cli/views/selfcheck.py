"""The report of `selfcheck` as tables."""

import dataclasses
from typing import TYPE_CHECKING

from mlx_openelm.cli.console import Console

if TYPE_CHECKING:
    from mlx_openelm.bench.selfcheck import SelfCheck


def show_selfcheck(console: Console, report: "SelfCheck") -> None:
    """Print the machine, a table of the checks, and the demo model's text."""
    from rich.table import Table

    machine = dataclasses.asdict(report.machine)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("mlx-openelm", report.version)
    for name, value in machine.items():
        facts.add_row(
            name, f"{value / 1e9:.1f} GB" if name == "memory_bytes" else value
        )
    table = Table("check", "found", "at most", "", box=None)
    for check in report.checks:
        table.add_row(
            check.name,
            f"{check.value:.2g}",
            f"{check.limit:.2g}",
            "ok" if check.passed else "FAILED",
        )
    console.answer_table(facts)
    console.answer("")
    console.answer_table(table)
    console.answer("")
    console.answer(report.text)
