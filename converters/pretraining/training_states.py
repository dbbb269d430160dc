"""Full training states: weights, optimizer state and position; ours and CoreNet's.

CoreNet's layout is a dictionary with `iterations`, `model_state_dict`,
`optim_state_dict` and so on. Ours adds `resume`, the position in the data and in the
log. An optimizer's state is keyed by the tensors' names, or by integers whose names are
in the `param_names` of the parameter groups, as in CoreNet's runs without FSDP.

Beside each file is its SHA-256 checksum (`sha256sum -c` reads it).
"""

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from converters.reference import ReferenceOpenELM
from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import parse_json
from mlx_openelm.message_parts import list_names
from mlx_openelm.storage.staging import replaced_file
from mlx_openelm.tensor_names import HEAD, map_to_corenet, unwrap

CLASSIFIER = "classifier.weight"  # CoreNet's name of an untied head
CHECKSUM = ".sha256"  # appended to the name of a file

Weights = dict[str, Tensor]
Optimizers = list[torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Position of a run.

    Attributes:
        loader: position in the data, of all processes together; empty: its beginning.
        meter: state of the log's `Meter`; empty at the beginning.
        origin: the training state outside of its folder that the run started from.
    """

    step: int
    loader: dict[str, Any]
    meter: dict[str, Any]
    origin: str | None = None


@dataclass(frozen=True, slots=True)
class TrainingState:
    """A full training state as it is read.

    Attributes:
        weights: by CoreNet name.
        moments: the state of each parameter in its optimizer, by the same names.
    """

    path: Path
    progress: ResumePoint
    weights: Weights
    moments: dict[str, dict[str, Any]]


# Reading -----------------------------------------------------------------------------


def read_state(path: Path) -> TrainingState:
    """Read a training state; its tensors are read from disk when they are used.

    The position of a state without `resume` is that of its `iterations`, with the data
    from the beginning.

    Raises:
        OpenELMError: the file is damaged, or no training state.
    """
    state = read_file(path)
    try:
        if "resume" in state:
            progress = ResumePoint(**parse_json(state["resume"]))
        else:
            progress = ResumePoint(int(state["iterations"]), {}, {})
    except (KeyError, TypeError, ValueError) as error:
        raise OpenELMError(
            f"{path} has no position to resume from ({first_line(error)}); start a new "
            "run from its weights with init."
        ) from error
    try:
        weights = by_corenet_name(state["model_state_dict"])
        moments = _name_moments(state["optim_state_dict"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OpenELMError(
            f"{path} is no training state ({first_line(error)}); start a new run from "
            "its weights with init."
        ) from error
    return TrainingState(path, progress, weights, moments)


def _name_moments(stored: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the states of an optimizer's parameters by CoreNet name."""
    names: dict[Any, Any] = {}
    for group in stored["param_groups"]:
        names |= dict(zip(group["params"], _parameter_names(group), strict=True))
    states = {names.get(key, key): state for key, state in stored["state"].items()}
    if not all(isinstance(name, str) for name in states):
        raise ValueError("its optimizer's parameters have no param_names")
    return by_corenet_name(states)


def _parameter_names(group: dict[str, Any]) -> list[Any]:
    names: list[Any] = group.get("param_names", group["params"])
    return names


def by_corenet_name(values: dict[str, Any]) -> dict[str, Any]:
    """Return values by CoreNet's names of their tensors, without wrappers' parts."""
    return {ours: values[name] for ours, name in map_to_corenet(values).items()}


def restore_state(
    model: ReferenceOpenELM, optimizers: Optimizers, state: TrainingState
) -> None:
    """Load the weights, and the optimizer's moments; its settings are the recipe's."""
    names = {id(p): unwrap(name) for name, p in model.named_parameters()}
    groups = [
        {**group, "params": [names[id(p)] for p in group["params"]]}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    moments = {
        name: {key: _as_moment(key, value) for key, value in values.items()}
        for name, values in state.moments.items()
    }
    try:
        _check_moments(optimizers, names, moments)
        load_weights(model, state.weights)
        stored: dict[str, Any] = {"state": moments, "param_groups": groups}
        set_optimizer_state_dict(
            model,
            optimizers,
            stored,
            options=StateDictOptions(full_state_dict=True),
        )
    except (RuntimeError, KeyError, ValueError) as error:
        raise OpenELMError(
            f"The weights or the optimizer state in {state.path} do not fit the recipe "
            f"({first_line(error)}); use the recipe that the run started with."
        ) from error


def _as_moment(key: str, value: Any) -> Any:
    """Return the count of steps as a tensor, and moments in float32."""
    return torch.as_tensor(value, dtype=torch.float32) if key == "step" else value


def _check_moments(
    optimizers: Optimizers, names: dict[int, str], moments: dict[str, dict[str, Any]]
) -> None:
    """Raise ValueError if a parameter has no moments, or those of another optimizer."""
    for optimizer in optimizers:
        keys = _MOMENTS[type(optimizer)]
        for parameter in (p for g in optimizer.param_groups for p in g["params"]):
            name = names[id(parameter)]
            found = moments.get(name, {})
            if lacking := keys - found.keys():
                raise ValueError(
                    f"{name} has no {list_names(sorted(lacking), quoted=False)}"
                )
            for key in sorted(keys - {"step"}):
                if tuple(found[key].shape) != tuple(parameter.shape):
                    raise ValueError(
                        f"{key} of {name} has shape {tuple(found[key].shape)}, "
                        f"expected {tuple(parameter.shape)}"
                    )


_MOMENTS = {
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.Muon: {"momentum_buffer"},
}


def load_weights(model: ReferenceOpenELM, weights: Weights) -> None:
    """Load full weights into a model, which may be sharded."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, {**weights}, options=options)


def read_file(path: Path) -> dict[str, Any]:
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


# Writing -----------------------------------------------------------------------------


def collect_state(
    model: ReferenceOpenELM, optimizers: Optimizers
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all weights and the optimizer state, by name; all processes call this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    return weights, get_optimizer_state_dict(model, optimizers, options=options)


def describe_state(
    progress: ResumePoint,
    weights: dict[str, Any],
    optimizer: dict[str, Any],
    *,
    scheduled: bool,
) -> dict[str, Any]:
    """Return the dictionary that is saved, in CoreNet's layout."""
    return {
        "iterations": progress.step,
        "epoch": 0,
        "model_state_dict": weights,
        "optim_state_dict": optimizer,
        "best_metric": math.inf,
        "is_interval_ckpt": scheduled,
        "resume": json.dumps(asdict(progress)),  # not CoreNet's; JSON text
    }


def as_corenet(path: Path, *, sharded: bool) -> dict[str, Any]:
    """Return a stored state as CoreNet saves it, without the position in the data.

    Args:
        sharded: as with FSDP: the optimizer's state is keyed by name. Otherwise it is
            the state of torch's AdamW, and the gradient scaler's is included.

    Raises:
        OpenELMError: the file is damaged, no training state, or not of AdamW alone.
    """
    state = read_state(path)  # checks it
    stored = read_file(path)
    if not all(m.keys() >= {"exp_avg", "exp_avg_sq"} for m in state.moments.values()):
        raise OpenELMError(
            f"{path} has the state of Muon, which CoreNet does not have; only a run "
            "with optimizer.name: adamw can be exported."
        )
    optimizer: dict[str, Any] = {"state": {}, "param_groups": []}
    for group in stored["optim_state_dict"]["param_groups"]:
        own = by_corenet_name(dict.fromkeys(_parameter_names(group)))
        names = [name for name in state.weights if name in own]
        first = len(optimizer["state"])
        keys = [_spell(n) if sharded else first + i for i, n in enumerate(names)]
        optimizer["state"] |= {
            key: state.moments[name] for key, name in zip(keys, names, strict=True)
        }
        spelled = {"param_names": [_spell(name) for name in names], "params": keys}
        optimizer["param_groups"].append({**group, **spelled})
    scaler = torch.amp.GradScaler("cpu").state_dict()  # of its first step
    return {
        "iterations": state.progress.step,
        "epoch": 0,
        "model_state_dict": {_spell(n): w for n, w in state.weights.items()},
        "optim_state_dict": optimizer,
        "best_metric": math.inf,
        "is_interval_ckpt": True,
        **({} if sharded else {"gradient_scaler_state_dict": scaler}),
    }


def _spell(name: str) -> str:
    return CLASSIFIER if name == HEAD else name


# Files -------------------------------------------------------------------------------


def write_checked(path: Path, value: object) -> None:
    """Replace a file of torch.save, and the checksum beside it.

    The checksum is removed first: a run that is killed in between leaves a complete
    file without one, which is accepted.

    Raises:
        OpenELMError: writing failed; the old file is unchanged.
    """
    with explained_errors(path):
        _checksum_file(path).unlink(missing_ok=True)
        with replaced_file(path) as staged, staged.open("wb") as file:
            hashed = _HashingFile(file)
            torch.save(value, cast(IO[bytes], hashed))
        _write_checksum(path, hashed.digest.hexdigest())


def link_checked(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, with its checksum.

    Raises:
        OpenELMError: writing failed; the old target is unchanged.
    """
    with explained_errors(target):
        _checksum_file(target).unlink(missing_ok=True)
        with replaced_file(target) as staged:
            staged.unlink(missing_ok=True)
            try:
                os.link(source, staged)
            except OSError:  # not every file system has hard links
                shutil.copyfile(source, staged)
        if (checksum := read_checksum(source)) is not None:
            _write_checksum(target, checksum)


def remove_checked(path: Path) -> None:
    """Remove a file and its checksum."""
    path.unlink()
    _checksum_file(path).unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Compare a file with the checksum beside it, if there is one.

    Raises:
        OpenELMError: they differ.
    """
    checksum = read_checksum(path)
    if checksum is None:
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
            raise OpenELMError(
                f"{path} is damaged: its SHA-256 is not the one in "
                f"{_checksum_file(path).name}."
            )


def read_checksum(path: Path) -> str | None:
    """Return the checksum beside a file, or None."""
    try:
        words = _checksum_file(path).read_text().split()
    except FileNotFoundError:
        return None
    return words[0] if words else ""


def _write_checksum(path: Path, checksum: str) -> None:
    with replaced_file(_checksum_file(path)) as staged:
        staged.write_text(f"{checksum}  {path.name}\n")


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + CHECKSUM)


class _HashingFile(io.BufferedIOBase):
    """Writes to a file, and computes the checksum of what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)


@contextlib.contextmanager
def explained_errors(path: Path) -> Iterator[None]:
    """Raise errors of writing a file as OpenELMError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        raise OpenELMError(
            f"Cannot write {path} ({first_line(error)}); free some space there, then "
            "continue with `resume`."
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error, to be embedded in a message."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
