"""The command that trains from random weights, in PyTorch: `pretrain`."""

import os
import time
from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Json, Quiet, Seed, need_torch
from mlx_openelm.reporting.trackers import TRACKERS

SECONDS_TO_SPEAK = 10.0  # torchrun ends all processes when one ends


def pretrain_command(
    recipe: Annotated[
        str, typer.Option("-c", "--recipe", help="A recipe: name or file.")
    ],
    data: Annotated[
        list[str] | None, typer.Option(help="Text file pattern; repeatable.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="A .pt to begin with, config.json beside it."),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    seed: Seed = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what it would take; train nothing.")
    ] = False,
    devices: Annotated[
        int | None, typer.Option(help="Devices that --dry-run reckons with.")
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
    """Train an OpenELM from nothing, in PyTorch (needs PyTorch). Prints the weights.

    Several devices: torchrun --nproc-per-node N -m mlx_openelm pretrain -c RECIPE.
    """
    rank = int(os.environ.get("RANK", "0"))  # set by torchrun; the first alone speaks
    console = Console(quiet=quiet or rank > 0)
    from converters.pretraining.recipe import PretrainRecipe
    from mlx_openelm.recipe_loader import load_recipe

    said = {
        "data.train": data,
        "data.corpora": [] if data else None,  # said instead of the recipe's
        "init": init,
        "output": output,
        "steps": steps,
        "seed": seed,
        "report_to": report_to,
    }
    chosen = load_recipe(PretrainRecipe, recipe, said)
    from mlx_openelm.cli.views.pretraining import (
        PretrainingView,
        plan_as_json,
        show_plan,
    )

    if dry_run:
        from converters.pretraining.plan import plan_pretraining

        plan = plan_pretraining(chosen, devices=devices)
        if as_json:
            console.answer_json(plan_as_json(chosen, plan))
        else:
            show_plan(console, chosen, plan)
        return
    need_torch()
    from converters.pretraining.processes import SharedError
    from converters.pretraining.run import pretrain  # seconds: torch is imported

    with PretrainingView(console) as view:
        try:
            path = pretrain(chosen, resume=resume, on_event=view)
        except KeyboardInterrupt:
            console.note("\nSaved. The same command with --resume goes on.")
            raise
        except SharedError:  # the first process says it
            if rank > 0:
                time.sleep(SECONDS_TO_SPEAK)
                raise typer.Exit(1) from None
            raise
    if rank == 0 and as_json:
        console.answer_json({"path": str(path)})
    elif rank == 0:
        console.answer(str(path))
