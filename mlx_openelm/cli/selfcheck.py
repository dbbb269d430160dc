"""The command that checks the machine: `selfcheck`."""

import dataclasses

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Json, Quiet
from mlx_openelm.errors import OpenELMError


def selfcheck_command(as_json: Json = False, quiet: Quiet = False) -> None:
    """Check that this machine computes OpenELM rightly; prints a report to send."""
    console = Console(quiet=quiet)
    from mlx_openelm.bench.selfcheck import check_machine
    from mlx_openelm.cli.views.selfcheck import show_selfcheck

    report = check_machine(on_check=lambda name: console.note(f"checking {name} ..."))
    if as_json:
        console.answer_json(dataclasses.asdict(report))
    else:
        show_selfcheck(console, report)
    if not report.passed:
        raise OpenELMError(
            "This machine does not compute OpenELM rightly; please send the report "
            "above to the project."
        )
