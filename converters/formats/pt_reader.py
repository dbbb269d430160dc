"""Reads files of torch.save without torch: no code in them runs, no data is copied.

Such a file (CoreNet's `.pt`, `pytorch_model.bin`) is a zip of uncompressed records:
`NAME/data.pkl`, a pickle that describes the saved mapping, and `NAME/data/KEY`, the
numbers of one storage. A tensor in the pickle is a call, `_rebuild_tensor_v2(storage,
offset, shape, strides, ...)`; here it becomes a view of the mapped file.
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
        OpenELMError: the file cannot be read, is not torch.save's, is damaged, or would
            call a function that is not allowed; or there are no tensors, other values
            among them, unused storages, or a tensor whose elements overlap in memory.
    """
    archive = open_archive(path)
    found, unused = load_pickle(archive)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise OpenELMError(
            f"{path} holds a {type(found).__name__}, expected a mapping from names; "
            "save the model's state_dict()."
        )
    inner = (found[key] for key in STATE_DICT_KEYS if isinstance(found.get(key), dict))
    found = next(inner, found)
    found.pop("_metadata", None)  # torch's module versions; no tensor depends on them
    others = [
        name
        for name, value in found.items()
        if not (isinstance(name, str) and isinstance(value, PtTensor))
    ]
    if others or not found:
        raise OpenELMError(
            f"{path} should hold tensors by name and nothing else, at the top or under "
            f"{' or '.join(STATE_DICT_KEYS)}; found {list_names(others)}; save the "
            "model's state_dict() by itself."
        )
    if unused:  # so a tensor uses the storage of another one
        raise archive.damaged(
            f"record {list_names(sorted(unused))} belongs to no tensor"
        )
    folded = [name for name, tensor in found.items() if _is_folded(tensor.array)]
    if folded:
        raise archive.damaged(
            f"{list_names(folded)} would have one number in several places"
        )
    return found


def _is_folded(array: Array) -> bool:
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
