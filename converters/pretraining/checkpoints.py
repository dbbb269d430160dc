"""The files of a run, in CoreNet's layout, and which of them a run resumes from.

    checkpoint_epoch_0_iter_N.pt            weights after N steps, a flat state dict
    training_checkpoint_epoch_0_iter_N.pt   weights, optimizer state and position
    training_checkpoint_last.pt             the newest of these, or an interruption's
    checkpoint_average.pt                   the mean of the last weights: the result
    recipe.json                             the recipe; written before the first step
    config.json, tokenizer.model            next to the weights, where `convert` looks

Files are replaced atomically, so a run may be killed at any moment. A sharded model is
gathered first, so that a checkpoint fits any number of processes.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from converters.pretraining.recipe import PretrainRecipe
from converters.pretraining.training_states import (
    Optimizers,
    ResumePoint,
    TrainingState,
    Weights,
    as_corenet,
    check_file,
    collect_state,
    describe_state,
    explained_errors,
    link_checked,
    read_file,
    read_state,
    remove_checked,
    write_checked,
)
from converters.reference import ReferenceOpenELM
from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.storage.staging import lock_file, replaced_file

WEIGHTS, STATE = "checkpoint_epoch_0_iter_", "training_checkpoint_epoch_0_iter_"
LAST = "training_checkpoint_last.pt"
AVERAGE = "checkpoint_average.pt"
RECIPE = "recipe.json"
LOCK = ".lock"

Resume = bool | str  # True: from the last state; "auto": if there is one; or a path
AUTO = "auto"


# Saving ------------------------------------------------------------------------------


def save_training(
    folder: Path,
    progress: ResumePoint,
    model: ReferenceOpenELM,
    optimizers: Optimizers,
    *,
    scheduled: bool,
    first: bool,
) -> None:
    """Replace the training state. All processes call this.

    No RNG state is saved: after the initial weights only the order of the text is
    random, and the loader's state determines it.

    Args:
        scheduled: a checkpoint of the schedule (`save_every`), not of an interruption.
            It also has files of its own. That of the weights is written before the
            state: a run that resumes from that would not write them again.
        first: whether this process writes.
    """
    weights, optimizer = collect_state(model, optimizers)
    if not first:
        return
    state = describe_state(progress, weights, optimizer, scheduled=scheduled)
    if scheduled:
        write_checked(folder / f"{WEIGHTS}{progress.step}.pt", weights)
        write_checked(folder / f"{STATE}{progress.step}.pt", state)
        link_checked(folder / f"{STATE}{progress.step}.pt", folder / LAST)
    else:
        write_checked(folder / LAST, state)


def export_corenet(recipe: PretrainRecipe, resume: Resume) -> Path:
    """Write a training state of a run as CoreNet's, and return its path.

    Args:
        resume: the path of a state; otherwise the last one of `output` is exported.

    Raises:
        OpenELMError: there is no such state, it is damaged, or CoreNet has none alike.
    """
    output = Path(recipe.output)
    source = state_path(resume) or output / LAST
    if not source.is_file():
        raise OpenELMError(f"There is nothing to export: {source} is missing.")
    step = read_training(source).progress.step
    state = as_corenet(source, sharded=recipe.parallel == "fsdp")
    target = output / "corenet" / f"{STATE}{step}.pt"
    with explained_errors(target):
        target.parent.mkdir(exist_ok=True)
    write_checked(target, state)
    return target


def remove_old_files(folder: Path, recipe: PretrainRecipe) -> None:
    """Remove states except the newest `keep_states`, and old weights.

    The weights of the newest `keep_last` and of `keep_every` stay.
    """
    for step, path in list(files_on_disk(folder, WEIGHTS).items())[: -recipe.keep_last]:
        if recipe.keep_every is None or step % recipe.keep_every:
            remove_checked(path)
    if recipe.keep_states is not None:
        states = list(files_on_disk(folder, STATE).values())
        for path in states[: -recipe.keep_states]:
            remove_checked(path)


def files_on_disk(folder: Path, prefix: str) -> dict[int, Path]:
    """Return the files of weights or states by step, in order."""
    steps = {
        path.stem.removeprefix(prefix): path for path in folder.glob(f"{prefix}*.pt")
    }
    return dict(sorted((int(n), path) for n, path in steps.items() if n.isdecimal()))


def average_checkpoints(paths: Sequence[Path]) -> Weights:
    """Return the mean of checkpoints, summed in float64, in the dtypes of the first.

    Raises:
        OpenELMError: there is no file, or one is damaged.
    """
    if not paths:
        raise OpenELMError(
            "There is no checkpoint_epoch_0_iter_N.pt to average; the last weights are "
            f"in {LAST}, which convert can read."
        )
    total: Weights = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in paths:
        check_file(path)
        for name, value in read_file(path).items():
            dtypes.setdefault(name, value.dtype)
            total[name] = total.get(name, 0) + value.double()
    return {
        name: (value / len(paths)).to(dtypes[name]) for name, value in total.items()
    }


def write_json_atomically(path: Path, value: dict[str, Any]) -> None:
    """Write a value as JSON. Raises as `write_atomically`."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda staged: staged.write_text(text))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file, as `replaced_file`.

    Raises:
        OpenELMError: writing failed; the old file is unchanged.
    """
    with explained_errors(path), replaced_file(path) as staged:
        write(staged)


# Resuming ----------------------------------------------------------------------------


def find_state(folder: Path, resume: Resume) -> Path | None:
    """Return the training state that a run resumes from, after `check_folder`."""
    if resume and (folder / LAST).exists():
        return folder / LAST
    return state_path(resume)


def state_path(resume: Resume) -> Path | None:
    """Return the training state that is given by its path, or None."""
    return Path(resume) if isinstance(resume, str) and resume != AUTO else None


def read_training(path: Path, *, check: bool = True) -> TrainingState:
    """Read a training state.

    Args:
        check: compare it with its checksum, which reads all of it.

    Raises:
        OpenELMError: it is damaged; an older state of the same run is named.
    """
    try:
        if check:
            check_file(path)
        return read_state(path)
    except OpenELMError as error:
        raise OpenELMError(f"{error}{_offer_older(path)}") from error


def _offer_older(damaged: Path) -> str:
    for step, path in reversed(files_on_disk(damaged.parent, STATE).items()):
        with contextlib.suppress(OpenELMError):
            if path != damaged:
                check_file(path)
                read_state(path)
                return f" `resume` {path} continues from step {step}, the one before."
    return ""


# Checks before a run -----------------------------------------------------------------


_PROTECTED = ("metrics.jsonl", "*.pt", "*.safetensors")  # patterns of other results


def check_folder(recipe: PretrainRecipe, resume: Resume) -> None:
    """Check that a run may use its folder.

    A run that was killed before its first checkpoint resumes from step 0. Resuming from
    an older state in the folder makes this the last one.

    Raises:
        OpenELMError: there is nothing to resume, or the recipe differs; or the folder
            holds a run and `resume` is off or the path of another run's state.
    """
    output = Path(recipe.output)
    started = (output / RECIPE).exists() or (output / LAST).exists()
    path = state_path(resume)
    if path is not None and not path.is_file():
        raise OpenELMError(f"`resume` is {path}, which is not a file.")
    if not resume or (isinstance(resume, str) and not started):
        if started:
            raise OpenELMError(
                f"{output} already holds a run; use `resume` to continue it, or "
                "another `output`."
            )
        others = [p.name for form in _PROTECTED for p in sorted(output.glob(form))]
        if others:
            raise OpenELMError(
                f"{output} already holds {', '.join(others[:5])}; use another `output`."
            )
        return
    if not started:
        raise OpenELMError(f"There is nothing to resume: {output / LAST} is missing.")
    now, before = _fixed(as_json(recipe)), _fixed(read_mapping(output / RECIPE))
    changed = sorted(k for k in now | before if now.get(k) != before.get(k))
    if changed:
        differences = "; ".join(
            f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed
        )
        raise OpenELMError(
            f"Cannot resume {output} with another recipe ({differences}); use the old "
            "recipe, or another `output`."
        )
    if path is None or not (output / LAST).exists():
        return
    if path.parent.resolve() == output.resolve():
        if path.name != LAST:
            read_training(path)
            link_checked(path, output / LAST)
    elif read_training(output / LAST, check=False).progress.origin != str(
        path.resolve()
    ):
        raise OpenELMError(
            f"{output} already holds a run, which did not start from {path}; use "
            "`resume` alone to continue it, or another `output`."
        )


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a run's folder; the lock is released when the process ends.

    Raises:
        OpenELMError: another process trains there, such as one that outlived torchrun.
    """
    refusal = f"Another process is training in {folder}; wait for it, or stop it."
    with lock_file(folder / LOCK, refusal, required=False):
        yield


def as_json(recipe: PretrainRecipe) -> dict[str, Any]:
    """Return the recipe as JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return values


_MAY_CHANGE = (  # on resume: they do not affect what is learned
    *("output", "micro_batch_size", "parallel", "bf16", "activation_checkpointing"),
    *("compile", "report_every", "eval_every", "eval_window", "eval_sequences"),
    *("save_every", "keep_last", "keep_every", "keep_states", "average_last"),
    *("sample_every", "sample_prompts", "tensorboard", "report_to", "generation"),
    *("compare_log", "join_timeout"),
    *("data.on_damage", "data.cache", "data.workers"),
)


def _fixed(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that must not change on resume, by dotted key.

    Keys that a recipe of an earlier version lacks have their defaults.
    """
    defaults = as_json(PretrainRecipe())
    flat: dict[str, Any] = {}
    for key, value in (defaults | recipe).items():
        if isinstance(value, dict):
            values = (defaults.get(key) or {}) | value
            flat |= {f"{key}.{inner}": setting for inner, setting in values.items()}
        else:
            flat[key] = value
    flat["data.corpora"] = [
        [corpus.get(key) for key in ("files", "text_key", "token_share")]
        for corpus in flat["data.corpora"]
    ]
    return {
        key: value
        for key, value in flat.items()
        if key not in _MAY_CHANGE and key.split(".")[0] not in _MAY_CHANGE
    }
