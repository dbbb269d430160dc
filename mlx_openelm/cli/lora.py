"""The command that fine-tunes: `lora`."""

import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.derived_options import GivenOptions, OptionsOf, derive_options
from mlx_openelm.cli.options import (
    MODEL_VARIABLE,
    Force,
    Json,
    NoTuning,
    Offline,
    Quiet,
    use_tuning,
)
from mlx_openelm.cli.uploading import (
    Public,
    UploadRepo,
    answer_and_upload,
    check_upload,
)
from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.options import OUTPUT_PANEL

if TYPE_CHECKING:
    from mlx_openelm.finetuning.preparation import Prepared

READING = "Reading the data"


@derive_options
def lora_command(
    *,
    recipe: Annotated[
        str | None,
        typer.Option(
            "-c",
            "--recipe",
            help="Recipe: the name of a bundled one (mlx-openelm recipes) or a YAML "
            "file; other options override it.",
            rich_help_panel="Data",
        ),
    ] = None,
    options: Annotated[GivenOptions, OptionsOf(FinetuneRecipe)],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume the run in --adapter-path from its last checkpoint.",
            rich_help_panel="Schedule and checkpoints",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the data and show the plan and its memory, without training.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit",
            help="Choose smaller settings if the run would not fit into memory.",
            rich_help_panel="Batches and memory",
        ),
    ] = False,
    upload_repo: UploadRepo = None,
    public: Public = False,
    force: Force = False,
    no_tuning: NoTuning = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Fine-tune a model on a file of examples.

    Options that are neither given nor in a recipe have the defaults below. Prints the
    path of the adapter folder.
    """
    from mlx_openelm.finetuning.run_folder import run_folder
    from mlx_openelm.recipe_loader import load_recipe, make_recipe
    from mlx_openelm.tuning import environment_of_run

    if resume and force:
        raise typer.BadParameter(
            "cannot be used with --force, which starts a new run",
            param_hint="--resume",
        )
    if resume and recipe is None:
        recipe = _find_recipe_of_run(options)
    if recipe is not None:
        length = {name: options.pop(name, None) for name in ("epochs", "iters")}
        chosen = load_recipe(FinetuneRecipe, recipe, options)
        if any(
            value is not None for value in length.values()
        ):  # instead of the recipe's
            chosen = dataclasses.replace(chosen, **length)
    elif "data" in options:
        options.setdefault("model", os.environ.get(MODEL_VARIABLE) or "demo")
        chosen = make_recipe(FinetuneRecipe, options, "the options")
    else:
        raise typer.BadParameter(
            "give a file of examples, or a recipe with --recipe", param_hint="--data"
        )
    rank = int(os.environ.get("MLX_RANK", "0"))  # set by mlx.launch; rank 0 reports
    console = Console(quiet=quiet or rank > 0)
    state = run_folder(chosen) / "state.safetensors"
    variables = environment_of_run(state) if resume else None
    tuning = use_tuning(console, no_tuning, variables)
    from mlx_openelm.cli.views.finetuning import (
        TrainingView,
        note_plan,
        plan_json,
        show_trained,
    )
    from mlx_openelm.finetuning.preparation import prepare
    from mlx_openelm.finetuning.run import finetune

    if dry_run:
        with console.progress(READING) as progress:
            prepared = prepare(
                chosen, fit=fit, offline=offline, on_progress=progress.update
            )
        if as_json:
            console.answer_json(plan_json(prepared))
        else:
            note_plan(console, prepared)
        return
    target = check_upload(upload_repo, public=public, offline=offline)
    with TrainingView(console) as view, console.progress(READING) as progress:

        def note_prepared(prepared: "Prepared") -> None:
            progress.close()
            view.note_start(prepared)

        report = finetune(
            chosen,
            resume=resume,
            force=force,
            fit=fit,
            offline=offline,
            tuning=tuning,
            on_event=view,
            on_prepared=note_prepared,
            on_progress=progress.update,
        )
    if rank > 0:
        return
    answer_and_upload(
        console,
        report,
        lambda console, report: show_trained(console, report, view.prompt),
        target,
        as_json=as_json,
    )


def _find_recipe_of_run(options: GivenOptions) -> str | None:
    """Return the recipe of the run to resume, and add its folder to the options.

    The folder is --adapter-path, or the default one of --data. None: --data and the
    other options describe the run.
    """
    from mlx_openelm.finetuning.run_folder import DEFAULT_PARENT, default_folder

    if "adapter_path" not in options and "data" not in options:
        found = sorted(DEFAULT_PARENT.glob("*/recipe.yaml"))
        example = found[0].parent if len(found) == 1 else "DIR"
        raise typer.BadParameter(
            "needs the folder of the run: --resume --adapter-path "
            f"{shlex.quote(str(example))}",
            param_hint="--resume",
        )
    folder = options.get("adapter_path") or str(default_folder(options["data"]))
    written = Path(folder) / "recipe.yaml"
    if written.is_file():
        options["adapter_path"] = folder
        return str(written)
    if "data" not in options:
        raise OpenELMError(
            f"There is no run to resume in {folder} (no recipe.yaml); leave out "
            "--resume, and give --data."
        )
    return None
