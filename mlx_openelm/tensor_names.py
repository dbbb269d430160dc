"""Mapping between CoreNet's tensor names and those of model folders.

`OpenELMConfig.tensor_shapes` uses CoreNet's names. Model folders use the names of
Hugging Face and mlx-lm: CoreNet's with the prefix `transformer.`, except for an untied
head.
"""

from collections.abc import Iterable

from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import list_names

PREFIX = "transformer."
HEAD = "lm_head.weight"
EMBEDDING = "token_embeddings.weight"

MODEL_KEYS = ("model_state_dict", "state_dict", "model")  # of weights in a checkpoint
_ROOTS = {  # first parts of CoreNet's names, and how the head is named elsewhere
    "token_embeddings": "token_embeddings",
    "layers": "layers",
    "norm": "norm",
    "lm_head": "lm_head",
    "classifier": "lm_head",
}
_BUFFERS = {  # last parts of the names of buffers, which are computed, not trained
    *("inv_freq", "causal_mask", "cos_cached", "sin_cached", "_cached_cos"),
    *("_cached_sin", "freqs_cis", "position_ids", "masked_bias"),
    *("n_averaged", "_extra_state"),  # of AveragedModel and of Transformer Engine
}


def to_folder(corenet_name: str) -> str:
    """Return a tensor's name in a model folder."""
    untied = corenet_name.startswith("lm_head.")  # the weight, or a packed part of it
    return corenet_name if untied else PREFIX + corenet_name


def to_module(corenet_name: str) -> str:
    """Return the path in the model of the module with this weight."""
    return to_folder(corenet_name).removesuffix(".weight")


def unwrap(name: str) -> str:
    """Return a tensor's name without the parts that wrappers insert.

    These are `_orig_mod` of torch.compile, `module` of DDP, `_fsdp_wrapped_module`,
    `_checkpoint_wrapped_module` and so on.
    """
    *path, last = name.split(".")
    kept = [part for part in path if part != "module" and not part.startswith("_")]
    return ".".join((*kept, last))


def to_corenet(name: str) -> str:
    """Return CoreNet's name of a tensor from the name that another tool stored.

    Removes wrappers, and what is around the model (`transformer`, Lightning's `model`).
    """
    unwrapped = unwrap(name)
    parts = unwrapped.split(".")
    for at, part in enumerate(parts[:-1]):
        if part in _ROOTS:
            return ".".join((_ROOTS[part], *parts[at + 1 :]))
        if part.isdecimal():  # a layer of another architecture
            break
    return unwrapped.removeprefix(PREFIX)


def is_buffer(name: str) -> bool:
    """Return whether a stored tensor is a buffer, which carries no weights."""
    return name.rpartition(".")[2] in _BUFFERS


def map_to_corenet(names: Iterable[str]) -> dict[str, str]:
    """Return a mapping of CoreNet's names to the given names, without buffers.

    Raises:
        OpenELMError: two names belong to the same tensor.
    """
    mapped: dict[str, str] = {}
    for name in names:
        if is_buffer(name):
            continue
        corenet_name = to_corenet(name)
        if corenet_name in mapped:
            raise OpenELMError(
                f"The tensors {mapped[corenet_name]} and {name} are both "
                f"{corenet_name}; remove one of them."
            )
        mapped[corenet_name] = name
    return mapped


def note_buffers(names: Iterable[str]) -> tuple[str, ...]:
    """Return a note for the user on the buffers that `map_to_corenet` leaves out."""
    buffers = [name for name in names if is_buffer(name)]
    if not buffers:
        return ()
    listed = list_names(buffers, most=3, quoted=False)
    one = len(buffers) == 1
    kind = "a buffer, which carries" if one else "buffers, which carry"
    return (f"Left out {listed}: {kind} no weights.",)
