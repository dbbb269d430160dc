"""Which tensors in a training checkpoint are the model's, and which their average.

A checkpoint is a tree of mappings and lists. Trainers store the weights at the top
level or under a key, and moving averages (EMA, SWA) of them beside them, under many
names. The readers of `convert` and of `pretrain` both use these functions.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.message_parts import list_names
from mlx_openelm.tensor_names import MODEL_KEYS, is_buffer

AVERAGE_COUNT = "n_averaged"  # in the state of torch's AveragedModel
_AVERAGES = {"ema", "swa", "avg", "average", "averaged", "averaging", "shadow"}
_MOMENTS = {"exp", "sq", "square", "grad"}  # with "avg", in an optimizer's state
_OPTIMIZERS = {"optim", "optimizer", "optimizers"}
_LIGHTNING = "current_model_state"  # beside it, Lightning's state_dict is an average
_PRECISIONS = ("bfloat16", "float16", "float32", "float64")

_CHOICE = (
    "`mlx-openelm convert` with `weights` ema uses the moving average (EMA) instead."
)

State = dict[Any, Any]
Role = Literal["model", "average", "other"]


def choose_weights(
    root: State,
    path: Path,
    is_tensor: Callable[[object], bool],
    weights: str | None = None,
) -> tuple[State, tuple[str, ...]]:
    """Return a state dict of a checkpoint, and notes for the user on the choice.

    Args:
        weights: "model" or "ema"; default the model's, if the checkpoint has them.

    Raises:
        OpenELMError: it has no such weights.
    """
    found = _list_weights(root, is_tensor)
    models = [one for one in found if one.role == "model"]
    averages = [one for one in found if one.role == "average"]
    averages.sort(key=lambda one: one.shapes.total(), reverse=True)
    reference = (models or averages)[0]
    averages = [one for one in averages if one.resembles(reference)]
    named = [one for one in averages if all(isinstance(n, str) for n in one.state)]
    candidates = named if weights == "ema" or not (models or weights) else models
    if not candidates:
        kind = "EMA" if weights == "ema" else "model"
        by_name = " by name" if averages and candidates is named else ""
        keys = [one.key for one in (*models, *averages) if one.key]
        only = f", only {list_names(keys, quoted=False)}" if keys else ""
        instead = "leave out `weights`" if weights else "save the model's state_dict()"
        raise OpenELMError(f"{path} has no {kind} weights{by_name}{only}; {instead}.")
    chosen, *_ = candidates
    copies = [one for one in found if one.role == "other" and one.resembles(chosen)]
    others = [one for one in (*models, *averages, *copies) if one is not chosen]
    notes: tuple[str, ...] = ()
    if others or chosen.role == "average":
        average = " (moving average, EMA)" if chosen.role == "average" else ""
        keys = [one.key or "the others" for one in others]
        unused = f", not {list_names(keys, quoted=False)}" if keys else ""
        notes = (f"Weights: {chosen.key or 'all'}{average} of {path.name}{unused}.",)
        if named and chosen.role == "model" and weights is None:
            notes += (_CHOICE,)
    return chosen.state, notes


def find_config(path: Path) -> Path | None:
    """Find CoreNet's YAML or the config.json of `pretrain` next to a .pt file."""
    names = (f"{path.stem}.yaml", "config.yaml", "config.json")
    for candidate in (path.with_name(name) for name in names):
        if candidate.is_file() and _is_openelm(read_mapping(candidate)):
            return candidate
    return None


def _is_openelm(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "openelm" or any(
        str(key).split(".")[0] == "model" for key in config
    )


def is_copied_head(head: Any, table: Any, cast: Callable[[Any, Any], Any]) -> bool:
    """Return whether an output head (V, D) is a copy of the embedding (W, D).

    A copy may have another float dtype. One of the two may also have more rows, all
    alike, which are padding.

    Args:
        head: an array of mlx or torch, as is `table`.
        cast: converts an array to a dtype.
    """
    if head.shape[1:] != table.shape[1:]:
        return False
    if head.dtype != table.dtype:
        spelled = [str(array.dtype).rpartition(".")[2] for array in (head, table)]
        if not set(spelled) <= set(_PRECISIONS):
            return False
        places = [_PRECISIONS.index(name) for name in spelled]
        narrow = (head if places[0] < places[1] else table).dtype
        head, table = cast(head, narrow), cast(table, narrow)
    rows = min(head.shape[0], table.shape[0])
    padding = [array[rows:] for array in (head, table) if array.shape[0] > rows]
    return bool((head[:rows] == table[:rows]).all()) and all(
        bool((extra == extra[:1]).all()) for extra in padding
    )


@dataclass(frozen=True, slots=True)
class _Weights:
    """One of the sets of tensors in a checkpoint.

    Attributes:
        key: where they are, for messages; empty for the top level.
        shapes: the number of tensors of each shape, without scalars and buffers.
        role: "other" may be a copy of the model, such as a teacher, or anything else.
    """

    key: str
    state: State
    shapes: Counter[tuple[int, ...]]
    role: Role

    def resembles(self, other: "_Weights") -> bool:
        """Whether both may be weights of one model; one may lack some tensors."""
        fewer, more = sorted((self.shapes, other.shapes), key=Counter.total)
        return not fewer - more and 2 * fewer.total() >= more.total()


def _list_weights(root: State, is_tensor: Callable[[object], bool]) -> list[_Weights]:
    """Return the sets of tensors; those of the model in the order of preference."""
    lightning = _LIGHTNING in root
    keys = (_LIGHTNING,) if lightning else MODEL_KEYS
    found: list[_Weights] = []
    for path, state in _walk(root, is_tensor):
        role: Role = "other"
        if any(map(_is_average, path)) or (lightning and path == ("state_dict",)):
            role = "average"
        elif all(key in keys for key in path):
            role = "model"
        optimizer = any(_OPTIMIZERS & _words(key) for key in path)
        if path and not (optimizer and role == "other"):
            found += _split(".".join(path), state, role, is_tensor)
    if all(one.role == "other" for one in found):
        state = next((root[k] for k in keys if isinstance(root.get(k), dict)), root)
        return [*_split("", state, "model", is_tensor), *found]
    if shapes := _count_shapes(root, is_tensor):
        found.append(_Weights("", root, shapes, "other"))
    order = {key: place for place, key in enumerate(keys)}
    return sorted(found, key=lambda one: order.get(one.key.split(".")[0], len(order)))


def _walk(
    value: object, is_tensor: Callable[[object], bool], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], State]]:
    """Yield every mapping or list with tensors, and the keys that lead to it."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return
    if _count_shapes(value, is_tensor):
        yield path, value
    for key, inner in value.items():
        yield from _walk(inner, is_tensor, (*path, str(key)))


def _split(
    key: str, state: State, role: Role, is_tensor: Callable[[object], bool]
) -> list[_Weights]:
    """Return the parts of a state dict; names such as "ema.*" are of an average."""
    parts: dict[str, State] = {"": {}}
    for name, value in state.items():
        path = str(name).split(".")[:-1]
        prefix = next((part for part in path if _is_average(part)), "")
        parts.setdefault(prefix, {})[name] = value
    if role != "other" and AVERAGE_COUNT in (str(n).split(".")[-1] for n in state):
        role = "average"
    if role == "average" and len(parts) > 1:
        role = "other"  # of the names without such a prefix
    return [
        _Weights(
            f"{key} {prefix}.*".strip() if prefix else key,
            part,
            shapes,
            "average" if prefix else role,
        )
        for prefix, part in parts.items()
        if (shapes := _count_shapes(part, is_tensor))
    ] or [_Weights(key, state, Counter(), role)]


def _count_shapes(
    state: State, is_tensor: Callable[[object], bool]
) -> Counter[tuple[int, ...]]:
    tensors: list[Any] = [
        value
        for name, value in state.items()
        if is_tensor(value) and not is_buffer(str(name))
    ]
    return Counter(tuple(one.shape) for one in tensors if len(one.shape))


def _is_average(key: str) -> bool:
    """Return whether a key or a part of a name has a word such as "ema"."""
    words = _words(key)
    return bool(_AVERAGES & words) and not _MOMENTS & words


def _words(key: str) -> set[str]:
    """Return the words of a key in lower case; they end where the case changes."""
    words = re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)
    return {word.lower() for word in words}
