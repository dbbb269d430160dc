"""Mapping between CoreNet's tensor names and those of model folders.

`OpenELMConfig.tensor_shapes` uses CoreNet's names. Model folders use the names of
Hugging Face and mlx-lm: CoreNet's with the prefix `transformer.`, except for an untied
head.
"""

from collections.abc import Iterable

from mlx_openelm.errors import OpenELMError

PREFIX = "transformer."
HEAD = "lm_head.weight"
EMBEDDING = "token_embeddings.weight"

_OTHER_HEADS = ("classifier.weight", f"{PREFIX}classifier.weight")  # CoreNet, HF


def to_folder(corenet_name: str) -> str:
    """Return a tensor's name in a model folder."""
    untied = corenet_name.startswith("lm_head.")  # the weight, or a packed part of it
    return corenet_name if untied else PREFIX + corenet_name


def to_module(corenet_name: str) -> str:
    """Return the path in the model of the module with this weight."""
    return to_folder(corenet_name).removesuffix(".weight")


def to_corenet(name: str) -> str:
    """Return CoreNet's name of a tensor, from a name of CoreNet, DDP, HF or mlx-lm."""
    name = name.removeprefix("module.")
    return HEAD if name in _OTHER_HEADS else name.removeprefix(PREFIX)


def map_to_corenet(names: Iterable[str]) -> dict[str, str]:
    """Return a mapping of CoreNet's names to the given names.

    Raises:
        OpenELMError: two names belong to the same tensor.
    """
    mapped: dict[str, str] = {}
    for name in names:
        corenet_name = to_corenet(name)
        if corenet_name in mapped:
            raise OpenELMError(
                f"The tensors {mapped[corenet_name]} and {name} are both "
                f"{corenet_name}; remove one of them."
            )
        mapped[corenet_name] = name
    return mapped
