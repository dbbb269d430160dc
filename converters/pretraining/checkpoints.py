"""Checkpoints of pre-training, in CoreNet's layout.

    checkpoint_epoch_0_iter_N.pt   weights after N steps, a flat state dict
    training_checkpoint_last.pt    weights, optimizer state and position in the data
    checkpoint_average.pt          the mean of the last weights: the result
    recipe.json                    the recipe; written before the first step
    config.json, tokenizer.model   next to the weights, where `convert` looks for them

Files are replaced atomically, so a run may be killed at any moment. A sharded model is
gathered first, so that a checkpoint fits any number of processes.
"""

import contextlib
import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from converters.formats.checkpoint_weights import choose_weights, is_copied_head
from converters.pretraining.recipe import PretrainRecipe
from converters.reference import ReferenceOpenELM
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import parse_json
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.storage.staging import lock_file, replaced_file
from mlx_openelm.tensor_names import (
    EMBEDDING,
    HEAD,
    map_to_corenet,
    split_buffers,
)

LAST = "training_checkpoint_last.pt"
AVERAGE = "checkpoint_average.pt"
RECIPE = "recipe.json"
LOCK = ".lock"

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Position of a run.

    Attributes:
        loader: position in the data, of all processes together.
        meter: state of the log's `Meter`.
    """

    step: int
    loader: dict[str, Any]
    meter: dict[str, Any]


# Saving and resuming -----------------------------------------------------------------


def save_training(
    folder: Path,
    progress: ResumePoint,
    model: ReferenceOpenELM,
    optimizers: list[torch.optim.Optimizer],
    *,
    scheduled: bool,
    first: bool,
) -> None:
    """Replace the training state. All processes call this.

    No RNG state is saved: after the initial weights only the order of the text is
    random, and the loader's state determines it.

    Args:
        scheduled: a checkpoint of the schedule (`save_every`), not of an interruption.
            Its weights are also written to their own file, before the training state:
            a run that resumes from that would not write them again.
        first: whether this process writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    optimizer = get_optimizer_state_dict(model, optimizers, options=options)
    if not first:
        return
    state = {
        "iterations": progress.step,
        "epoch": 0,
        "model_state_dict": weights,
        "optim_state_dict": optimizer,
        "best_metric": math.inf,
        "is_interval_ckpt": scheduled,
        "resume": json.dumps(asdict(progress)),  # not CoreNet's; JSON text
    }
    if scheduled:
        name = f"checkpoint_epoch_0_iter_{progress.step}.pt"
        write_atomically(folder / name, lambda path: torch.save(weights, path))
    write_atomically(folder / LAST, lambda path: torch.save(state, path))


def restore_training(
    folder: Path,
    model: ReferenceOpenELM,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
) -> None:
    """Load weights and optimizer state from the result of `read_training`."""
    try:
        load_weights(model, state["model_state_dict"])
        set_optimizer_state_dict(
            model,
            optimizers,
            state["optim_state_dict"],
            options=StateDictOptions(full_state_dict=True),
        )
    except (RuntimeError, KeyError, ValueError) as error:
        raise OpenELMError(
            f"The weights or the optimizer state in {folder / LAST} do not fit the "
            f"recipe ({first_line(error)}); use the recipe that the run started with."
        ) from error


def read_training(folder: Path) -> tuple[dict[str, Any], ResumePoint]:
    """Read the training state; its tensors are read from disk when they are used.

    Raises:
        OpenELMError: the file is damaged, or not from mlx-openelm.
    """
    path = folder / LAST
    state = read_weights(path)
    try:
        return state, ResumePoint(**parse_json(state["resume"]))
    except (KeyError, TypeError, ValueError) as error:
        raise OpenELMError(
            f"{path} has no position to resume from ({first_line(error)}); start a new "
            "run from its weights with init."
        ) from error


def remove_old_weights(folder: Path, recipe: PretrainRecipe) -> None:
    """Remove weights except the newest `keep_last` and those of `keep_every`."""
    for step, path in list(weights_on_disk(folder).items())[: -recipe.keep_last]:
        if recipe.keep_every is None or step % recipe.keep_every:
            path.unlink()


def weights_on_disk(folder: Path) -> dict[int, Path]:
    """Return the files of weights by step, in order."""
    steps = {
        path.stem.rpartition("_")[2]: path
        for path in folder.glob("checkpoint_epoch_0_iter_*.pt")
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
        for name, value in read_weights(path).items():
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
    try:
        with replaced_file(path) as staged:
            write(staged)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        raise OpenELMError(
            f"Cannot write {path} ({first_line(error)}); free some space there, then "
            "continue with `resume`."
        ) from error


# Checks before a run -----------------------------------------------------------------


_PROTECTED = ("metrics.jsonl", "*.pt", "*.safetensors")  # patterns of other results


def check_folder(recipe: PretrainRecipe, *, resume: bool) -> None:
    """Check that a run may use its folder.

    A run that was killed before its first checkpoint resumes from step 0.

    Raises:
        OpenELMError: there is nothing to resume, or the recipe differs; or the folder
            holds a run and `resume` is off.
    """
    output = Path(recipe.output)
    started = (output / RECIPE).exists() or (output / LAST).exists()
    if not resume:
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
    *("save_every", "keep_last", "keep_every", "average_last", "sample_every"),
    *("sample_prompts", "tensorboard", "report_to", "generation"),
    *("data.on_damage", "data.cache", "data.workers"),
)


def _fixed(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that must not change on resume, by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": setting for inner, setting in value.items()}
        else:
            flat[key] = value
    return {
        key: value
        for key, value in flat.items()
        if key not in _MAY_CHANGE and key.split(".")[0] not in _MAY_CHANGE
    }


# Weights -----------------------------------------------------------------------------


def read_initial(path: Path) -> tuple[OpenELMConfig, Weights, tuple[str, ...]]:
    """Read initial weights from a CoreNet .pt, and the config.json next to it.

    Returns:
        The config, the weights, and notes for the user on which weights they are.

    Raises:
        OpenELMError: one of them is missing or damaged, or they do not fit together.
    """
    if not path.is_file():
        raise OpenELMError(f"The recipe's init, {path}, is not a file.")
    config_path = path.with_name("config.json")
    if not config_path.is_file():
        raise OpenELMError(
            f"There is no config.json next to {path}; add it, as it has the sizes."
        )
    config = OpenELMConfig.from_file(config_path)
    state, notes = choose_weights(
        read_weights(path), path, lambda value: isinstance(value, Tensor)
    )
    stored = {name: v for name, v in state.items() if isinstance(v, Tensor)}
    if not stored or not all(isinstance(name, str) for name in stored):
        raise OpenELMError(f"{path} holds no weights by name; use another init.")
    tensors, left_out = split_buffers(stored)
    integers = [k for k, v in tensors.items() if not v.is_floating_point()]
    if integers:
        raise OpenELMError(
            f"{integers[0]} in {path} has dtype {tensors[integers[0]].dtype}; use a "
            "file whose weights are not quantized."
        )
    weights = {ours: tensors[name] for ours, name in map_to_corenet(tensors).items()}
    tied = config.share_input_output_layers and {HEAD, EMBEDDING} <= weights.keys()
    if tied and is_copied_head(weights[HEAD], weights[EMBEDDING], Tensor.to):
        rows = len(weights.pop(HEAD))
        weights[EMBEDDING] = weights[EMBEDDING][:rows]
    if EMBEDDING in weights:  # often with padding rows
        config = replace(config, vocab_size=len(weights[EMBEDDING]))
    expected = config.tensor_shapes()
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = [n for n in expected | shapes if expected.get(n) != shapes.get(n)]
    if wrong:
        raise OpenELMError(
            f"{path} does not fit its config.json: {wrong[0]} has shape "
            f"{shapes.get(wrong[0], 'none')}, expected "
            f"{expected.get(wrong[0], 'no such tensor')}."
        )
    floats = {name: value.float() for name, value in weights.items()}
    return config, floats, (*notes, *left_out)


def load_weights(model: ReferenceOpenELM, weights: Weights) -> None:
    """Load full weights into a model, which may be sharded."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, {**weights}, options=options)


def read_weights(path: Path) -> dict[str, Any]:
    """Read a file of torch.save; its tensors are read from disk when they are used.

    Raises:
        OpenELMError: it is damaged, or does not hold a dictionary.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise OpenELMError(
            f"{path} is damaged, or not a file of torch.save ({first_line(error)})."
        ) from error
    if not isinstance(state, dict):
        raise OpenELMError(f"{path} holds a {type(state).__name__}, not weights.")
    return state


def first_line(error: Exception) -> str:
    """Return the first line of an error, to be embedded in a message."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
