"""The command that checks this machine: `selfcheck`."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Json, Quiet
from mlx_openelm.errors import OpenELMError


def selfcheck_command(
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Measure which settings are fastest here, in at most ten minutes, and "
            "keep those that change no output.",
        ),
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Time limit of --tune, after which nothing more is started.",
            min=1,
            show_default="540",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that this machine computes OpenELM correctly. Prints a report to send."""
    console = Console(quiet=quiet)
    if tune:
        _tune(console, seconds, as_json=as_json)
        return
    if seconds is not None:
        raise typer.BadParameter("is the limit of --tune", param_hint="--seconds")
    from mlx_openelm.bench.selfcheck import check_machine
    from mlx_openelm.cli.views.selfcheck import show_selfcheck

    report = check_machine(on_check=lambda name: console.note(f"checking {name} ..."))
    console.answer_report(report, show_selfcheck, as_json=as_json)
    if not report.passed:
        raise OpenELMError(
            "This machine does not compute OpenELM correctly; please send the report "
            "above to the project."
        )


def _tune(console: Console, seconds: float | None, *, as_json: bool) -> None:
    from mlx_openelm.bench.tune import Workload, tune_machine
    from mlx_openelm.cli.views.selfcheck import show_tuning
    from mlx_openelm.storage.shards import write_json
    from mlx_openelm.storage.staging import replaced_file
    from mlx_openelm.tuning import as_stored, tuning_file

    settings = tuning_file()
    sent = settings.with_name("tuning-report.json")
    with _explain_errors(settings):  # before the long work
        settings.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.parent):
            pass
    workload = Workload.of_device()
    if seconds is not None:
        workload = dataclasses.replace(workload, seconds=seconds)
    report = tune_machine(workload, lambda name: console.note(f"measuring: {name} ..."))
    console.answer_report(report, show_tuning, as_json=as_json)
    with _explain_errors(settings):
        with replaced_file(settings) as part:
            write_json(part, as_stored(report.chosen))
        with replaced_file(sent) as part:
            write_json(part, dataclasses.asdict(report))
    console.note(f"Settings: {settings}")
    console.note(f"Report to send: {sent}")


@contextlib.contextmanager
def _explain_errors(settings: Path) -> Iterator[None]:
    from mlx_openelm.tuning import FILE_VARIABLE

    try:
        yield
    except OSError as error:
        raise OpenELMError(
            f"Cannot write {settings}: {error.strerror or error}; set {FILE_VARIABLE} "
            "to another file."
        ) from error
