"""Read files of torch.save without torch, running no code.

Such a file (CoreNet's `.pt`, `pytorch_model.bin`) is a zip of uncompressed records:
`NAME/data.pkl`, a pickle of the saved mapping, and `NAME/data/KEY`, the numbers of one
storage. In the pickle a tensor is a call, `_rebuild_tensor_v2(storage, offset, shape,
strides, ...)`; it becomes a description, and its numbers are read on demand.
"""

from dataclasses import dataclass
from pathlib import Path

from converters.formats.pickle_machine import PtTensor, load_pickle
from converters.formats.pt_archive import open_archive
from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import list_names
from mlx_openelm.tensor_names import MODEL_KEYS, is_buffer

AVERAGES = {"ema", "swa"}  # words in the keys and names of averaged weights
AVERAGE_COUNT = "n_averaged"  # in the state of torch's AveragedModel


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights in a file of torch.save, by their stored names.

    Attributes:
        notes: notes for the user on which weights they are.
    """

    tensors: dict[str, PtTensor]
    notes: tuple[str, ...] = ()


def read_state_dict(path: Path) -> dict[str, PtTensor]:
    """Return the tensors of a model by their stored names; see `read_checkpoint`."""
    return read_checkpoint(path).tensors


def read_checkpoint(path: Path, weights: str | None = None) -> Checkpoint:
    """Return the weights of a model or their moving average (EMA).

    They are the top level of the file, or under one of `MODEL_KEYS` or a key such as
    ema_state_dict.

    Args:
        weights: "model" or "ema"; default the model's, if the file has them.

    Raises:
        OpenELMError: the file cannot be read, is not from torch.save, is damaged, or
            would call a function that is not allowed; or it has no tensors, values
            that are not tensors, unused storages, or tensors with overlapping elements;
            or it lacks the `weights`.
    """
    archive = open_archive(path)
    root, unused = load_pickle(archive)
    if not isinstance(root, dict) or not all(isinstance(key, str) for key in root):
        raise OpenELMError(
            f"{path} holds a {type(root).__name__}, expected a mapping from names; "
            "save the model's state_dict()."
        )
    state, notes = _choose_weights(root, weights, path)
    state.pop("_metadata", None)  # torch's module versions; no tensor depends on them
    others = [
        name
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(value, PtTensor))
        and not (isinstance(name, str) and is_buffer(name))
    ]
    if others or not state:
        raise OpenELMError(
            f"{path} must hold only tensors by name, at the top level or under "
            f"{', '.join(MODEL_KEYS)} or ema_state_dict; found {list_names(others)}; "
            "save only the model's state_dict()."
        )
    if unused:  # so a tensor uses the storage of another one
        raise archive.damaged(
            f"record {list_names(sorted(unused))} belongs to no tensor"
        )
    tensors = {str(n): t for n, t in state.items() if isinstance(t, PtTensor)}
    if overlapping := [name for name, tensor in tensors.items() if _overlaps(tensor)]:
        raise archive.damaged(f"elements of {list_names(overlapping)} overlap")
    return Checkpoint(tensors, notes)


@dataclass(frozen=True, slots=True)
class _Weights:
    """One of the sets of weights in a file.

    Attributes:
        key: where they are, for messages; empty for the top level.
        is_average: a moving average of the weights.
    """

    key: str
    state: dict[object, object]
    is_average: bool


def _choose_weights(
    root: dict[object, object], weights: str | None, path: Path
) -> tuple[dict[object, object], tuple[str, ...]]:
    """Return a state dict of the file, and notes on the choice."""
    found = _list_weights(root)
    models = [one for one in found if not one.is_average]
    averages = [one for one in found if one.is_average]
    candidates = averages if weights == "ema" or not (models or weights) else models
    if not candidates:
        kind = "EMA" if weights == "ema" else "model"
        only = list_names((one.key for one in found if one.key), quoted=False)
        named = f", only {only}" if any(one.key for one in found) else ""
        raise OpenELMError(f"{path} has no {kind} weights{named}; leave out `weights`.")
    chosen, *_ = candidates
    others = [one.key or "the others" for one in found if one is not chosen]
    notes: tuple[str, ...] = ()
    if others or chosen.is_average:
        average = " (moving average, EMA)" if chosen.is_average else ""
        unused = f", not {list_names(others, quoted=False)}" if others else ""
        key = chosen.key or "all"
        notes = (f"Weights: {key}{average} of {path.name}{unused}.",)
        if averages and not chosen.is_average and weights is None:
            notes += ("`weights` ema uses the moving average (EMA) instead.",)
    return chosen.state, notes


def _list_weights(root: dict[object, object]) -> list[_Weights]:
    """Return the sets of weights, in the order of preference."""
    keys = [key for key in MODEL_KEYS if isinstance(root.get(key), dict)]
    keys += [str(k) for k in root if isinstance(root[k], dict) and _is_average(str(k))]
    states = {key: _find_state(root[key], nested=_is_average(key)) for key in keys}
    present = {key: state for key, state in states.items() if state is not None}
    if not present:
        present = {"": root}
    found = []
    for key, state in present.items():
        parts: dict[str, dict[object, object]] = {}
        for name, value in state.items():
            path = str(name).split(".")[:-1]
            prefix = next((part for part in path if _is_average(part)), "")
            parts.setdefault(prefix, {})[name] = value
        averaged = _is_average(key) or any(str(n) == AVERAGE_COUNT for n in state)
        found += [
            _Weights(
                f"{key} {prefix}.*".strip() if prefix else key,
                part,
                averaged or bool(prefix),
            )
            for prefix, part in (parts or {"": state}).items()
        ]
    return found


def _is_average(key: str) -> bool:
    return bool(AVERAGES & set(key.lower().split("_")))


def _find_state(value: object, *, nested: bool) -> dict[object, object] | None:
    """Return a mapping with tensors: the value, or with `nested` one inside it."""
    if not isinstance(value, dict):
        return None
    if not nested or any(isinstance(inner, PtTensor) for inner in value.values()):
        return value
    inside = (_find_state(inner, nested=True) for inner in value.values())
    return next((state for state in inside if state is not None), None)


def _overlaps(tensor: PtTensor) -> bool:
    """Whether elements overlap in memory; those of weights never do."""
    if 0 in tensor.shape:
        return False
    dims = zip(tensor.strides, tensor.shape, strict=True)
    reached = 0  # elements from the first one
    for step, size in sorted((step, size) for step, size in dims if size > 1):
        if step <= reached:
            return True
        reached += step * (size - 1)
    return False
