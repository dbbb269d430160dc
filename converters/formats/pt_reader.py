"""Read files of torch.save without torch, running no code.

Such a file (CoreNet's `.pt`, `pytorch_model.bin`) is a zip of uncompressed records:
`NAME/data.pkl`, a pickle of the saved mapping, and `NAME/data/KEY`, the numbers of one
storage. In the pickle a tensor is a call, `_rebuild_tensor_v2(storage, offset, shape,
strides, ...)`; it becomes a description, and its numbers are read on demand.
"""

from dataclasses import dataclass
from pathlib import Path

from converters.formats.checkpoint_weights import choose_weights
from converters.formats.pickle_machine import PtTensor, load_pickle
from converters.formats.pt_archive import open_archive
from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import list_names
from mlx_openelm.tensor_names import MODEL_KEYS, is_buffer


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights in a file of torch.save, by their stored names.

    Attributes:
        notes: notes for the user on which weights they are.
    """

    tensors: dict[str, PtTensor]
    notes: tuple[str, ...] = ()


def read_checkpoint(path: Path, weights: str | None = None) -> Checkpoint:
    """Return the weights of a model or their moving average (EMA).

    `choose_weights` describes where they are.

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
    state, notes = choose_weights(
        root, path, lambda value: isinstance(value, PtTensor), weights
    )
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
