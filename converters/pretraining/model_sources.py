"""Models in other forms than a .pt file: the one module here that needs mlx."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError

Numbers = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model as `convert` reads it.

    Attributes:
        weights: name and numbers of each tensor; read when it is iterated.
        folder: where its tokenizer.model may be.
    """

    config: OpenELMConfig
    weights: Iterator[tuple[str, Numbers]]
    folder: Path
    notes: tuple[str, ...]


def open_model(name: str) -> OpenedModel:
    """Open a file, a model folder or a Hub id.

    Raises:
        OpenELMError: it is not a model, or mlx is not installed.
    """
    try:
        from converters.formats.sources import (
            locate,
            open_without_adapter,
            read_float32,
        )
    except ImportError as error:
        raise OpenELMError(
            f"Reading the sizes of {name} needs MLX: pip install mlx."
        ) from error
    source = open_without_adapter(locate(name))
    weights = ((n, read_float32(tensor)) for n, tensor in source.tensors.items())
    return OpenedModel(source.config, weights, source.folder, source.notes)
