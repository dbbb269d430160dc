"""What a fine-tuning run refuses before it starts or resumes."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.advice import describe_death
from mlx_openelm.finetuning.plan import TrainingPlan
from mlx_openelm.finetuning.preparation import Prepared
from mlx_openelm.finetuning.recipe import FinetuneRecipe, differences
from mlx_openelm.finetuning.trainer import Event
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.recipe_loader import load_recipe
from mlx_openelm.storage.adapter_folder import CONFIG, read_base_fingerprint
from mlx_openelm.storage.base_check import base_weights, check_base
from mlx_openelm.storage.model_folder import METADATA_KEY
from mlx_openelm.storage.staging import refuse_existing
from mlx_openelm.training.distributed import World
from mlx_openelm.training.state import RUNNING, STATE, load_state, read_events

RECIPE, PAGE = "recipe.yaml", "report.html"


def refuse_other_settings(prepared: Prepared, world: World) -> None:
    """Raise if this process would not train what the first one does."""
    recipe = dataclasses.replace(
        prepared.recipe, data="any", model="any", adapter_path=None, memory_limit=None
    )
    for what, ours in (
        ("data", prepared.table.digest),
        ("options", recipe.to_yaml()),
        ("model", str(prepared.folder.config)),
    ):
        if world.tell(ours) != ours:
            raise OpenELMError(
                f"Process {world.rank} has other {what} than process 0; give every "
                "machine the same files and the same command."
            )


def refuse_too_large(plan: TrainingPlan) -> None:
    """Raise if the planned memory is above the limit."""
    if plan.fits:
        return
    fitting = [flags for flags, total in plan.smaller if total <= plan.limit]
    advice = (
        f"say {fitting[0]}, or --fit to take that"
        if fitting
        else "no smaller setting fits either; choose a smaller model"
    )
    raise OpenELMError(
        f"The run needs about {plan.memory.total / 1e9:.2f} GB, and the limit is "
        f"{plan.limit / 1e9:.2f} GB: {advice}, or raise --memory-limit."
    )


def refuse_present_run(path: Path, force: bool) -> None:
    """Raise if the folder holds a run, or something else, that would be replaced."""
    if not force and (path / STATE).is_file():
        step = load_state(path).progress.step
        died = ""
        if (path / RUNNING).exists():
            recipe = load_recipe(FinetuneRecipe, str(path / RECIPE), {})
            died = f" {describe_death(step, recipe)}"
        raise OpenELMError(
            f"{path} holds a run, up to step {step}; go on with --resume, replace it "
            f"with --force, or choose another --adapter-path.{died}"
        )
    refuse_existing(path, force=force)


def refuse_other_run(
    prepared: Prepared, run: Mapping[str, Any], on_event: Callable[[Event], None]
) -> None:
    """Raise if the run in the folder is not the one that would go on."""
    path = prepared.path
    state = load_state(path)
    if not (path / RECIPE).is_file():
        raise OpenELMError(
            f"{path} holds no {RECIPE}, so nobody knows how its run was begun; begin "
            "anew with --force."
        )
    old = load_recipe(FinetuneRecipe, str(path / RECIPE), {})
    found = differences(old, prepared.recipe)
    if state.run.get("data") != run["data"]:
        found.append("the data is not the same")
    if found:
        raise OpenELMError(
            f"The run in {path} cannot go on with other settings: {'; '.join(found)}. "
            "Say what was said then, or begin anew with --force."
        )
    ends = [event for event in read_events(path) if event["event"] == "end"]
    if (
        ends
        and ends[-1].get("reason") in ("done", "patience")
        and (path / PAGE).exists()
    ):
        raise OpenELMError(
            f"The run in {path} is at its end, step {state.progress.step}; begin anew "
            "with --force, or choose another --adapter-path."
        )
    then, now = state.run.get("arithmetic", {}), run["arithmetic"]
    for name, value in now.items():
        if then.get(name) != value:
            text = (
                f"The run was begun with {name} {then.get(name)} and goes on with "
                f"{value}: last bits may differ from an uninterrupted run."
            )
            on_event({"event": "note", "step": state.progress.step, "text": text})


def refuse_other_base(path: Path, model: OpenELM) -> None:
    """Raise if the model is not the one that the run was begun with."""
    described = read_mapping(path / CONFIG).get(METADATA_KEY)
    stored = read_base_fingerprint(described) if isinstance(described, dict) else None
    notes = check_base(stored, base_weights(model), path, None) if stored else ()
    if notes:
        raise OpenELMError(
            f"The run in {path} cannot go on: {notes[0]} Say the same --model."
        )
