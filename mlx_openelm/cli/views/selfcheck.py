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
