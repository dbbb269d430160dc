"""The command that pre-trains a model in PyTorch: `pretrain`."""

import os
import time
from typing import Annotated, Literal

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Json, Quiet, need_torch
from mlx_openelm.options import OUTPUT_PANEL
from mlx_openelm.reporting.trackers import TRACKERS

RESUME_AUTO = "auto"
SCHEDULE = "Schedule and checkpoints"  # a heading in --help
REPORT_SECONDS = 10.0  # torchrun ends all processes when one ends


def pretrain_command(
    recipe: Annotated[
        str,
        typer.Option(
            "-c",
            "--recipe",
            help="Recipe: the name of a bundled one (mlx-openelm recipes) or a YAML "
            "file; other options override it.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Pattern of text files to train on; repeatable.",
            show_default="the recipe's",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Folder to write: checkpoints, weights and logs.",
            show_default="the recipe's",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Weights to start from: a .pt file, a model folder or a Hub id.",
            show_default="random weights",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Number of training steps.",
            show_default="the recipe's",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the random numbers.",
            show_default="the recipe's",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar=f"[{RESUME_AUTO}|PATH]",  # in brackets: the value may be left out
            help="Resume the run in --output from its last checkpoint; auto also "
            "starts a new one; PATH is a training state, of this project or CoreNet.",
            show_default="a new run",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    export: Annotated[
        Literal["corenet"] | None,
        typer.Option(
            help="Write the last training state of --output, or that of --resume PATH, "
            "as one of CoreNet, without training.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    compare_log: Annotated[
        str | None,
        typer.Option(
            help="Draw the loss of a training_logs.txt of CoreNet, or of the "
            "metrics.jsonl of another run, in the report of the run.",
            show_default="the recipe's",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show the plan, its memory and what is missing, without training.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
    check_data: Annotated[
        bool,
        typer.Option(
            "--check-data",
            help="List what is missing or damaged, by corpus, without training.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(
            help="Number of devices to plan for with --dry-run.",
            show_default="the recipe's, else 1",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            help="Also send the metrics to a tracker; repeatable.",
            metavar="|".join(TRACKERS),
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pre-train an OpenELM on text, from random weights (needs PyTorch).

    Prints the path of the final weights. To use more than one device:
    torchrun --nproc-per-node N -m mlx_openelm pretrain -c RECIPE.
    """
    rank = int(os.environ.get("RANK", "0"))  # set by torchrun; rank 0 reports
    console = Console(quiet=quiet or rank > 0)
    from converters.pretraining.recipe import PretrainRecipe
    from mlx_openelm.recipe_loader import load_recipe

    overrides = {
        "data.train": data,
        "data.corpora": [] if data else None,  # replaces the recipe's corpora
        "init": init,
        "output": output,
        "steps": steps,
        "seed": seed,
        "report_to": report_to,
        "compare_log": compare_log,
    }
    chosen = load_recipe(PretrainRecipe, recipe, overrides)
    from mlx_openelm.cli.views.pretraining import (
        PretrainingView,
        plan_as_json,
        show_check,
        show_plan,
    )

    if check_data:
        from converters.pretraining.data_check import check_data as check

        checked = check(chosen.data)
        console.answer_report(checked, show_check, as_json=as_json)
        checked.refuse_incomplete()
        return
    if dry_run:
        from converters.pretraining.plan import plan_pretraining

        plan = plan_pretraining(chosen, devices=devices)
        if as_json:
            console.answer_json(plan_as_json(chosen, plan))
        else:
            show_plan(console, chosen, plan)
        return
    need_torch()
    start = True if resume == "" else resume or False
    if export is not None:
        from converters.pretraining.checkpoints import export_corenet

        path = export_corenet(chosen, start)
        console.answer_json({"path": str(path)}) if as_json else console.answer(
            str(path)
        )
        return
    from converters.pretraining.processes import SharedError
    from converters.pretraining.run import pretrain  # seconds: torch is imported

    with PretrainingView(console) as view:
        try:
            path = pretrain(
                chosen,
                resume=start,
                on_event=view,
            )
        except KeyboardInterrupt:
            console.note("\nSaved. The same command with --resume continues the run.")
            raise
        except SharedError:  # rank 0 reports it
            if rank > 0:
                time.sleep(REPORT_SECONDS)
                raise typer.Exit(1) from None
            raise
    if rank == 0 and as_json:
        console.answer_json({"path": str(path)})
    elif rank == 0:
        console.answer(str(path))
        console.note_next("convert", path)
