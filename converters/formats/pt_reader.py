"""Read files of torch.save without torch, running no code and copying no data.

Such a file (CoreNet's `.pt`, `pytorch_model.bin`) is a zip of uncompressed records:
`NAME/data.pkl`, a pickle of the saved mapping, and `NAME/data/KEY`, the numbers of one
storage. In the pickle a tensor is a call, `_rebuild_tensor_v2(storage, offset, shape,
strides, ...)`; it is read as a view of the mapped file.
"""

from pathlib import Path

from converters.formats.pickle_machine import PtTensor, load_pickle
from converters.formats.pt_archive import Array, list_names, open_archive
from mlx_openelm.errors import OpenELMError

STATE_DICT_KEYS = ("model_state_dict", "ema_state_dict", "state_dict", "model")


def read_state_dict(path: Path) -> dict[str, PtTensor]:
    """Return the tensors of a model by their stored names.

    The mapping is the top level of the file, or the value of the first of
    `STATE_DICT_KEYS` in it.

    Raises:
        OpenELMError: the file cannot be read, is not from torch.save, is damaged, or
            would call a function that is not allowed; or it has no tensors, values
            that are not tensors, unused storages, or tensors with overlapping elements.
    """
    archive = open_archive(path)
    state, unused = load_pickle(archive)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise OpenELMError(
            f"{path} holds a {type(state).__name__}, expected a mapping from names; "
            "save the model's state_dict()."
        )
    inner = (state[key] for key in STATE_DICT_KEYS if isinstance(state.get(key), dict))
    state = next(inner, state)
    state.pop("_metadata", None)  # torch's module versions; no tensor depends on them
    others = [
        name
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(value, PtTensor))
    ]
    if others or not state:
        raise OpenELMError(
            f"{path} must hold only tensors by name, at the top level or under "
            f"{' or '.join(STATE_DICT_KEYS)}; found {list_names(others)}; save only "
            "the model's state_dict()."
        )
    if unused:  # so a tensor uses the storage of another one
        raise archive.damaged(
            f"record {list_names(sorted(unused))} belongs to no tensor"
        )
    overlapping = [name for name, tensor in state.items() if _overlaps(tensor.array)]
    if overlapping:
        raise archive.damaged(f"elements of {list_names(overlapping)} overlap")
    return state


def _overlaps(array: Array) -> bool:
    """Whether elements of an array overlap in memory; those of weights never do."""
    if array.size == 0:
        return False
    dims = zip(array.strides, array.shape, strict=True)
    reached = 0  # bytes from the first element
    for step, size in sorted((step, size) for step, size in dims if size > 1):
        if step <= reached:
            return True
        reached += step * (size - 1)
    return False
