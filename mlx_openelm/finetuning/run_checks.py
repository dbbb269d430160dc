"""Checks before a fine-tuning run starts or resumes."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.advice import describe_killed
from mlx_openelm.finetuning.plan import TrainingPlan
from mlx_openelm.finetuning.preparation import Prepared
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.run_files import RECIPE
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.message_parts import count_of
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.recipe_loader import load_recipe
from mlx_openelm.storage.adapter_folder import CONFIG, read_base_fingerprint
from mlx_openelm.storage.base_check import base_weights, check_base
from mlx_openelm.storage.model_folder import METADATA_KEY
from mlx_openelm.storage.staging import refuse_existing
from mlx_openelm.training.distributed import World
from mlx_openelm.training.events import Event, read_events
from mlx_openelm.training.state import RUNNING, STATE, load_state


def refuse_other_settings(
    prepared: Prepared, identity: Mapping[str, Any], world: World
) -> None:
    """Raise if this process has other data, options or models than rank 0."""
    recipe = dataclasses.replace(
        prepared.recipe,
        data="any",
        model="any",
        adapter_path=None,
        memory_limit=None,
        teacher=prepared.recipe.teacher and "any",
        teacher_cache=prepared.recipe.teacher_cache and "any",
    )
    for what, ours in (
        ("data", prepared.table.digest),
        ("options", recipe.to_yaml()),
        ("model", str(prepared.folder.config)),
        ("weights of the teacher", str(identity["teacher"])),
    ):
        if world.broadcast_text(ours) != ours:
            raise OpenELMError(
                f"Rank {world.rank} has other {what} than rank 0; use the same files "
                "and the same command on every machine."
            )


def refuse_too_large(plan: TrainingPlan) -> None:
    """Raise if the planned memory is above the limit."""
    if plan.fits:
        return
    fitting = [settings for settings, total in plan.smaller if total <= plan.limit]
    advice = (
        f"Use {fitting[0]}, or `fit` to choose this automatically"
        if fitting
        else "No smaller setting fits; use a smaller model"
    )
    raise OpenELMError(
        f"The run needs about {plan.memory.total / 1e9:.2f} GB, and the limit is "
        f"{plan.limit / 1e9:.2f} GB. {advice}, or raise `memory_limit`."
    )


def refuse_present_run(path: Path, force: bool) -> None:
    """Raise if a new run would replace a run or other files in the folder."""
    if not force and (path / STATE).is_file():
        step = load_state(path).progress.step
        if is_complete(path):
            raise OpenELMError(
                f"{path} has a complete run of {count_of(step, 'step')}; use `force` "
                "to replace it, or another `adapter_path`."
            )
        killed = ""
        if (path / RUNNING).exists():
            recipe = load_recipe(FinetuneRecipe, str(path / RECIPE), {})
            killed = f" {describe_killed(path, step, recipe)}"
        raise OpenELMError(
            f"{path} has a run, saved at step {step}; use `resume` to continue it, "
            f"`force` to replace it, or another `adapter_path`.{killed}"
        )
    refuse_existing(path, force=force)


def is_complete(path: Path) -> bool:
    """Return whether the run in a folder has ended, so that it cannot be resumed."""
    if (path / RUNNING).exists():  # killed before its report was complete
        return False
    ends = [event for event in read_events(path) if event["event"] == "end"]
    return bool(ends) and ends[-1].get("reason") in ("done", "patience")


def refuse_other_run(
    prepared: Prepared,
    identity: Mapping[str, Any],
    on_event: Callable[[Event], None],
) -> None:
    """Raise if the run in the folder is complete, or has other options or inputs."""
    path = prepared.path
    state = load_state(path)
    if not (path / RECIPE).is_file():
        raise OpenELMError(
            f"{path} has no {RECIPE}, so its run cannot be resumed; use `force` to "
            "start again."
        )
    old = load_recipe(FinetuneRecipe, str(path / RECIPE), {})
    changes = _differences(old, prepared.recipe)
    if state.run.get("data") != identity["data"]:
        changes.append("the data has changed")
    if state.run.get("teacher") != identity["teacher"]:
        changes.append("the teacher has changed")
    if changes:
        raise OpenELMError(
            f"The run in {path} cannot be resumed with other settings: "
            f"{'; '.join(changes)}. Use the old ones, or `force` to start again."
        )
    if is_complete(path):
        raise OpenELMError(
            f"The run in {path} is complete, at step {state.progress.step}; use "
            "`force` to start again, or another `adapter_path`."
        )
    then, now = state.run.get("arithmetic", {}), identity["arithmetic"]
    for name, value in now.items():
        if then.get(name) != value:
            text = (
                f"The run started with {name} {then.get(name)} and resumes with "
                f"{value}: rounding can differ from an uninterrupted run."
            )
            on_event({"event": "note", "step": state.progress.step, "text": text})


# Options that can change on resume: their effect on the result is rounding at most.
_MAY_CHANGE = (
    *("data", "adapter_path", "model", "teacher", "memory_limit", "grad_checkpoint"),
    *("batch_size", "grad_accumulation_steps"),  # with the same product
    *("steps_per_report", "save_every", "test", "report_to"),
)


def _differences(old: FinetuneRecipe, new: FinetuneRecipe) -> list[str]:
    """Describe the changes that prevent resuming a run of `old` with `new`."""
    changes = [
        f"`{field.name}` was {getattr(old, field.name)!r} and is now "
        f"{getattr(new, field.name)!r}"
        for field in dataclasses.fields(FinetuneRecipe)
        if field.name not in _MAY_CHANGE
        and getattr(old, field.name) != getattr(new, field.name)
    ]
    if old.masks_by_batch and old.batch_size != new.batch_size:
        changes.append(
            f"`batch_size` was {old.batch_size} and is now {new.batch_size}, which "
            "changes the dropout masks or noise"
        )
    if old.step_size != new.step_size:
        changes.append(
            f"`batch_size` times `grad_accumulation_steps` was {old.step_size} and is "
            f"now {new.step_size}"
        )
    return changes


def refuse_other_base(path: Path, model: OpenELM) -> None:
    """Raise if the run started from another base model."""
    described = read_mapping(path / CONFIG).get(METADATA_KEY)
    stored = read_base_fingerprint(described) if isinstance(described, dict) else None
    notes = check_base(stored, base_weights(model), path, None) if stored else ()
    if notes:
        raise OpenELMError(
            f"The run in {path} cannot be resumed: {notes[0]} Use the same `model`."
        )
