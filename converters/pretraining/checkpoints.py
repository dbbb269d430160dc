"""What a run keeps on disk, in CoreNet's layout, so that it can die at any moment.

    checkpoint_epoch_0_iter_N.pt   weights after N steps, a flat state dict
    training_checkpoint_last.pt    weights, optimizer and what else the next step needs
    checkpoint_average.pt          the mean of the last weights: the result
    recipe.json                    what is trained; there from the start
    config.json, tokenizer.model   beside the weights, where `convert` looks for them

Each file grows beside the old one and takes its name when it is on the disk. A sharded
model is put together first, so that a checkpoint fits any number of processes.
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

from converters.pretraining.recipe import PretrainRecipe
from converters.reference import ReferenceOpenELM
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.storage.staging import lock_file, replaced_file
from mlx_openelm.tensor_names import EMBEDDING, map_to_corenet

LAST = "training_checkpoint_last.pt"
AVERAGE = "checkpoint_average.pt"
RECIPE = "recipe.json"
LOCK = ".lock"

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """How far a run is.

    Attributes:
        loader: the place in the text, of all processes together.
        meter: of the log: what was counted since the last report.
    """

    step: int
    loader: dict[str, Any]
    meter: dict[str, Any]


# A run's folder ----------------------------------------------------------------------


def save_training(
    folder: Path,
    progress: ResumePoint,
    model: ReferenceOpenELM,
    optimizers: list[torch.optim.Optimizer],
    *,
    rhythm: bool,
    first: bool,
) -> None:
    """Replace the state to go on from. All processes call this.

    Nothing random comes after the first weights but the order of the text, whose
    numbers the loader keeps: no state of a generator is needed.

    Args:
        rhythm: it is a checkpoint of the recipe's rhythm, not of an interruption; the
            weights are kept apart too. They come first: a run that goes on from this
            state will not write them again.
        first: this process writes.
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
        "is_interval_ckpt": rhythm,
        "resume": json.dumps(asdict(progress)),  # ours; as text it is one value
    }
    if rhythm:
        name = f"checkpoint_epoch_0_iter_{progress.step}.pt"
        write_atomically(folder / name, lambda path: torch.save(weights, path))
    write_atomically(folder / LAST, lambda path: torch.save(state, path))


def restore_training(
    folder: Path,
    model: ReferenceOpenELM,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
) -> None:
    """Take over the weights and the optimizer of what `read_training` gave."""
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
            f"The weights or the optimizer in {folder / LAST} do not fit the recipe's "
            f"({first_line(error)}); use the recipe that the run began with."
        ) from error


def read_training(folder: Path) -> tuple[dict[str, Any], ResumePoint]:
    """Read the last state. The tensors stay on the disk until they are used.

    Raises:
        OpenELMError: the file is damaged, or none of ours.
    """
    path = folder / LAST
    state = read_weights(path)
    try:
        return state, ResumePoint(**json.loads(state["resume"]))
    except (KeyError, TypeError, ValueError) as error:
        raise OpenELMError(
            f"{path} does not say where its run was ({first_line(error)}), so it "
            "cannot go on; begin a new one from its weights with init."
        ) from error


def remove_old_weights(folder: Path, recipe: PretrainRecipe) -> None:
    """Leave the newest `keep_last` and one every `keep_every` steps."""
    for step, path in list(weights_on_disk(folder).items())[: -recipe.keep_last]:
        if recipe.keep_every is None or step % recipe.keep_every:
            path.unlink()


def weights_on_disk(folder: Path) -> dict[int, Path]:
    """Return step -> file, in order."""
    steps = {
        path.stem.rpartition("_")[2]: path
        for path in folder.glob("checkpoint_epoch_0_iter_*.pt")
    }
    return dict(sorted((int(n), path) for n, path in steps.items() if n.isdecimal()))


def average_checkpoints(paths: Sequence[Path]) -> Weights:
    """Return the mean, accumulated in float64, in the first one's dtypes.

    Raises:
        OpenELMError: there is no file, or one is damaged.
    """
    if not paths:
        raise OpenELMError(
            f"No checkpoint_epoch_0_iter_N.pt is left to average; {LAST} has the last "
            "weights, and convert reads it."
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
    """Write a value as JSON; errors as `write_atomically`."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda staged: staged.write_text(text))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file, as `replaced_file`.

    Raises:
        OpenELMError: the disk refuses; what was there stays.
    """
    try:
        with replaced_file(path) as staged:
            write(staged)
    except (OSError, RuntimeError) as error:  # torch.save knows the second one alone
        raise OpenELMError(
            f"Cannot write {path} ({first_line(error)}); free some space there, then "
            "say `resume`."
        ) from error


# May it begin? -----------------------------------------------------------------------


_FORMS = ("metrics.jsonl", "*.pt", "*.safetensors")  # no one's work is written over


def check_folder(recipe: PretrainRecipe, *, resume: bool) -> None:
    """Refuse to write over another run, or to go on with another recipe.

    A run that was killed before its first checkpoint is gone on with from its start.

    Raises:
        OpenELMError: there is nothing to resume, or the recipe differs; or the folder
            holds a run and `resume` is off.
    """
    output = Path(recipe.output)
    begun = (output / RECIPE).exists() or (output / LAST).exists()
    if not resume:
        if begun:
            raise OpenELMError(
                f"{output} holds a run already; say `resume` to go on, or another "
                "`output`."
            )
        foreign = [p.name for form in _FORMS for p in sorted(output.glob(form))]
        if foreign:
            raise OpenELMError(
                f"{output} holds {', '.join(foreign[:5])} of something else; say "
                "another `output`."
            )
        return
    if not begun:
        raise OpenELMError(f"There is nothing to resume: {output / LAST} is missing.")
    now, before = _decisive(as_json(recipe)), _decisive(read_mapping(output / RECIPE))
    changed = sorted(k for k in now | before if now.get(k) != before.get(k))
    if changed:
        differences = "; ".join(
            f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed
        )
        raise OpenELMError(
            f"Cannot resume {output} with another recipe ({differences}); "
            "use the old one, or another output."
        )


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; a death by whatever means lets them in.

    Raises:
        OpenELMError: another process trains there, left by a torchrun that died, say.
    """
    refusal = f"Another process trains in {folder}; let it finish, or end it first."
    with lock_file(folder / LOCK, refusal, required=False):
        yield


def as_json(recipe: PretrainRecipe) -> dict[str, Any]:
    """Return the recipe as it is read back from its file."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return found


_FREE = (  # may change between two starts: they do not say what is learnt
    *("output", "micro_batch_size", "parallel", "bf16", "activation_checkpointing"),
    *("compile", "report_every", "eval_every", "eval_window", "eval_sequences"),
    *("save_every", "keep_last", "keep_every", "average_last", "sample_every"),
    *("sample_prompts", "tensorboard", "report_to", "generation"),
    *("data.on_damage", "data.cache", "data.workers"),
)


def _decisive(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the weights, by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": found for inner, found in value.items()}
        else:
            flat[key] = value
    free = [key for key in flat if key in _FREE or key.split(".")[0] in _FREE]
    return {key: value for key, value in flat.items() if key not in free}


# Weights -----------------------------------------------------------------------------


def read_initial(path: Path) -> tuple[OpenELMConfig, Weights]:
    """Read a CoreNet .pt to begin with, and the config.json beside it.

    Raises:
        OpenELMError: one of them is missing or damaged, or they do not fit together.
    """
    if not path.is_file():
        raise OpenELMError(f"The recipe's init, {path}, is no file.")
    beside = path.with_name("config.json")
    if not beside.is_file():
        raise OpenELMError(
            f"There is no config.json beside {path}; put it there, it says the sizes."
        )
    config = OpenELMConfig.from_file(beside)
    found = read_weights(path)
    wrapped = found.get("model_state_dict", found)
    if not isinstance(wrapped, dict) or not all(isinstance(k, str) for k in wrapped):
        raise OpenELMError(f"{path} holds no weights by name; say another init.")
    given = {k: v for k, v in wrapped.items() if isinstance(v, Tensor)}
    whole = [k for k, v in given.items() if not v.is_floating_point()]
    if whole:
        raise OpenELMError(
            f"{whole[0]} in {path} holds {given[whole[0]].dtype}, no weights to train; "
            "say a file that is not quantized."
        )
    weights = {ours: given[theirs] for ours, theirs in map_to_corenet(given).items()}
    if EMBEDDING in weights:  # it often has rows for padding
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
    return config, {name: value.float() for name, value in weights.items()}


def load_weights(model: ReferenceOpenELM, weights: Weights) -> None:
    """Put whole weights into a model, which may be sharded."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, {**weights}, options=options)


def read_weights(path: Path) -> dict[str, Any]:
    """Read a file of torch.save; its tensors stay on the disk until they are used.

    Raises:
        OpenELMError: it is damaged, or holds no dictionary.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise OpenELMError(
            f"{path} is damaged, or no file of torch.save ({first_line(error)})."
        ) from error
    if not isinstance(found, dict):
        raise OpenELMError(f"{path} holds a {type(found).__name__}, not weights.")
    return found


def first_line(error: Exception) -> str:
    """Return what an error says first, as a part of a sentence."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
