"""The command that checks this machine: `selfcheck`."""

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Json, Quiet
from mlx_openelm.errors import OpenELMError


def selfcheck_command(as_json: Json = False, quiet: Quiet = False) -> None:
    """Check that this machine computes OpenELM correctly. Prints a report to send."""
    console = Console(quiet=quiet)
    from mlx_openelm.bench.selfcheck import check_machine
    from mlx_openelm.cli.views.selfcheck import show_selfcheck

    report = check_machine(on_check=lambda name: console.note(f"checking {name} ..."))
    console.answer_report(report, show_selfcheck, as_json=as_json)
    if not report.passed:
        raise OpenELMError(
            "This machine does not compute OpenELM correctly; please send the report "
            "above to the project."
        )
