"""Tensor names: CoreNet's, as in `OpenELMConfig.tensor_shapes`, and everybody else's.

The model folder has Hugging Face's and mlx-lm's names: CoreNet's behind `transformer.`;
only an untied head stands outside of it.
"""

from collections.abc import Iterable

from mlx_openelm.errors import OpenELMError

PREFIX = "transformer."
HEAD = "lm_head.weight"
EMBEDDING = "token_embeddings.weight"

_OTHER_HEADS = ("classifier.weight", f"{PREFIX}classifier.weight")  # CoreNet, HF


def to_folder(corenet_name: str) -> str:
    """Return the name in a model folder of a tensor that CoreNet calls so."""
    untied = corenet_name.startswith("lm_head.")  # its weight, or a part of it
    return corenet_name if untied else PREFIX + corenet_name


def to_module(corenet_name: str) -> str:
    """Return the path in the model of the module that has this weight."""
    return to_folder(corenet_name).removesuffix(".weight")


def to_corenet(name: str) -> str:
    """Return CoreNet's name of a tensor called so by CoreNet, DDP, HF or mlx-lm."""
    name = name.removeprefix("module.")
    return HEAD if name in _OTHER_HEADS else name.removeprefix(PREFIX)


def map_to_corenet(names: Iterable[str]) -> dict[str, str]:
    """Return CoreNet name -> given name.

    Raises:
        OpenELMError: two names mean the same tensor.
    """
    mapped: dict[str, str] = {}
    for name in names:
        meant = to_corenet(name)
        if meant in mapped:
            raise OpenELMError(
                f"The tensors {mapped[meant]} and {name} both stand for {meant}; "
                "remove one of them."
            )
        mapped[meant] = name
    return mapped
