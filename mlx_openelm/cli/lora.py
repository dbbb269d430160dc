"""The command that fine-tunes: `lora`."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Force, Json, Offline, Quiet, Seed
from mlx_openelm.errors import OpenELMError


def lora_command(
    data: Annotated[
        str | None,
        typer.Option(help="A .jsonl or .json file, or a folder with train.jsonl."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="demo (default), a folder, or a Hub id.")
    ] = None,
    adapter_path: Annotated[
        str | None, typer.Option(help="Where to; default adapters/<data name>.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("-c", "--recipe", help="A recipe: name or file.")
    ] = None,
    fine_tune_type: Annotated[
        str | None, typer.Option(help="lora (default), dora or full.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="sft (default), or dpo for preferences.")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(help="Train the last N blocks; -1 (default): all.")
    ] = None,
    rank: Annotated[
        str | None, typer.Option(help="Default 16; auto:16 follows the widths.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Multiplier of A B, default 2.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Of the adapter.")] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option(help="A module to adapt; repeatable; default all linears."),
    ] = None,
    prompt_key: Annotated[
        str | None, typer.Option(help="The prompt's name in the records.")
    ] = None,
    completion_key: Annotated[
        str | None, typer.Option(help="The answer's name in the records.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="raw, instruct, alpaca or openelm-peft.")
    ] = None,
    mask_prompt: Annotated[
        bool | None,
        typer.Option(
            "--mask-prompt/--no-mask-prompt",
            help="No loss on prompts; default where there are some.",
        ),
    ] = None,
    turns: Annotated[
        str | None, typer.Option(help="Learn all answers of a talk, or the last.")
    ] = None,
    max_seq_length: Annotated[
        int | None, typer.Option(help="Tokens; default 2048 or the context.")
    ] = None,
    max_prompt_length: Annotated[
        int | None, typer.Option(help="Of a preference; default half of that.")
    ] = None,
    pack: Annotated[
        bool | None,
        typer.Option("--pack", help="Fill rows of that length with samples."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Default 3.")] = None,
    iters: Annotated[int | None, typer.Option(help="Steps, not epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default 4.")] = None,
    grad_accumulation_steps: Annotated[
        int | None, typer.Option(help="Batches to a step, default 1.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, adam, sgd, lion, adafactor or muon.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default 3e-4; of dpo 5e-5.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="cosine (default), linear or constant.")
    ] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Default: a tenth.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default 0.")] = None,
    clip_norm: Annotated[
        float | None, typer.Option(help="Of the gradient; default 1, 0: none.")
    ] = None,
    z_loss: Annotated[float | None, typer.Option(help="Its weight, default 0.")] = None,
    dpo_loss: Annotated[str | None, typer.Option(help="sigmoid or hinge.")] = None,
    dpo_beta: Annotated[float | None, typer.Option(help="Default 0.1.")] = None,
    grad_checkpoint: Annotated[
        bool | None,
        typer.Option("--grad-checkpoint", help="Less memory, a third more work."),
    ] = None,
    seed: Seed = None,
    steps_per_report: Annotated[int | None, typer.Option(help="Default 10.")] = None,
    steps_per_eval: Annotated[int | None, typer.Option(help="Default 200.")] = None,
    val_batches: Annotated[
        int | None, typer.Option(help="Default 25; -1: all of them.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps, default 100.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after N validations without a gain.")
    ] = None,
    average_last: Annotated[
        int | None, typer.Option(help="Also write the mean of the last N saves.")
    ] = None,
    sample_prompt: Annotated[
        list[str] | None,
        typer.Option(help="Continue this at every validation; repeatable."),
    ] = None,
    memory_limit: Annotated[
        float | None, typer.Option(help="GB; default what this machine has.")
    ] = None,
    test: Annotated[
        bool | None, typer.Option("--test", help="Score the test file at the end.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run was left.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and plan; train nothing.")
    ] = False,
    fit: Annotated[
        bool, typer.Option("--fit", help="Take smaller settings, if need be.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Fine-tune a model on a file of examples. Prints the adapter's folder."""
    from mlx_openelm.finetuning.recipe import FinetuneRecipe
    from mlx_openelm.recipe_loader import load_recipe, make_recipe

    said: dict[str, Any] = {
        "data": data,
        "model": model,
        "adapter_path": adapter_path,
        "fine_tune_type": fine_tune_type,
        "objective": objective,
        "num_layers": num_layers,
        "rank": int(rank) if rank and rank.isdecimal() and len(rank) < 9 else rank,
        "scale": scale,
        "dropout": dropout,
        "keys": tuple(keys) if keys else None,
        "prompt_key": prompt_key,
        "completion_key": completion_key,
        "template": template,
        "mask_prompt": mask_prompt,
        "turns": turns,
        "max_seq_length": max_seq_length,
        "max_prompt_length": max_prompt_length,
        "pack": pack,
        "batch_size": batch_size,
        "grad_accumulation_steps": grad_accumulation_steps,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "clip_norm": clip_norm,
        "z_loss": z_loss,
        "dpo_loss": dpo_loss,
        "dpo_beta": dpo_beta,
        "grad_checkpoint": grad_checkpoint,
        "seed": seed,
        "steps_per_report": steps_per_report,
        "steps_per_eval": steps_per_eval,
        "val_batches": val_batches,
        "save_every": save_every,
        "patience": patience,
        "average_last": average_last,
        "sample_prompt": tuple(sample_prompt) if sample_prompt else None,
        "memory_limit": memory_limit,
        "test": test,
    }
    if resume and force:
        raise typer.BadParameter("goes on; --force begins anew", param_hint="--resume")
    length = {"epochs": epochs, "iters": iters}
    if resume and recipe is None and adapter_path is not None:
        then = Path(adapter_path).expanduser() / "recipe.yaml"
        recipe = str(then) if then.is_file() else None
        if recipe is None and data is None:
            raise OpenELMError(
                f"{adapter_path} holds no recipe.yaml, so there is nothing to go on "
                "from; leave out --resume, and say --data."
            )
    if recipe is None and data is None:
        raise typer.BadParameter("say the examples to learn from", param_hint="--data")
    if recipe is None:
        said["model"] = model or os.environ.get("MLX_OPENELM_MODEL") or None
        chosen = make_recipe(FinetuneRecipe, {**said, **length}, "the options")
    else:
        chosen = load_recipe(FinetuneRecipe, recipe, said)
        if epochs is not None or iters is not None:  # in place of the recipe's
            chosen = dataclasses.replace(chosen, epochs=epochs, iters=iters)
    rank_here = int(os.environ.get("MLX_RANK", "0"))  # of mlx.launch: the first speaks
    console = Console(quiet=quiet or rank_here > 0)
    from mlx_openelm.cli.views.finetuning import (
        TrainingView,
        note_plan,
        note_trained,
        plan_json,
    )
    from mlx_openelm.finetuning.preparation import prepare
    from mlx_openelm.finetuning.run import finetune

    if dry_run:
        prepared = prepare(chosen, fit=fit, offline=offline)
        if as_json:
            console.answer_json(plan_json(prepared))
        else:
            note_plan(console, prepared)
        return
    with TrainingView(console) as view:
        report = finetune(
            chosen,
            resume=resume,
            force=force,
            fit=fit,
            offline=offline,
            on_event=view,
            on_prepared=lambda prepared: note_plan(console, prepared),
        )
    if rank_here > 0:
        return
    if as_json:
        console.answer_json(dataclasses.asdict(report))
    else:
        note_trained(console, report)
        console.answer(str(report.path))
