"""Weights that a run starts from: a .pt file, or any model that `convert` reads.

A .pt file is read by torch, so that this works where mlx is not installed.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from converters.formats.checkpoint_weights import (
    choose_weights,
    find_config,
    is_copied_head,
)
from converters.pretraining.model_sources import open_model
from converters.pretraining.training_states import Weights, read_file
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.paths import user_path
from mlx_openelm.tensor_names import EMBEDDING, HEAD, map_to_corenet, split_buffers


@dataclass(frozen=True, slots=True)
class InitialWeights:
    """Weights and sizes of a model.

    Attributes:
        config: its vocabulary has the rows of the stored embedding.
        weights: in float32, by CoreNet name.
        folder: where its tokenizer.model may be.
        notes: notes for the user on which weights they are.
    """

    config: OpenELMConfig
    weights: Weights
    folder: Path
    notes: tuple[str, ...]


def read_initial(name: str) -> InitialWeights:
    """Read the weights of a .pt file, a model folder or a Hub id.

    Raises:
        OpenELMError: they are missing or damaged, or do not fit the config.json or
            CoreNet's YAML next to them.
    """
    path = user_path(name)
    if path.is_file():
        return _read_pt(path)
    if path.suffix in (".pt", ".bin"):
        raise OpenELMError(f"The recipe's init, {path}, is not a file.")
    opened = open_model(name)
    weights = {n: torch.from_numpy(numbers) for n, numbers in opened.weights}
    return InitialWeights(opened.config, weights, opened.folder, opened.notes)


def _read_pt(path: Path) -> InitialWeights:
    state, notes = choose_weights(
        read_file(path), path, lambda value: isinstance(value, Tensor)
    )
    stored = {name: v for name, v in state.items() if isinstance(v, Tensor)}
    if not stored or not all(isinstance(name, str) for name in stored):
        raise OpenELMError(f"{path} holds no weights by name; use another init.")
    tensors, left_out = split_buffers(stored)
    integers = [k for k, v in tensors.items() if not v.is_floating_point()]
    if integers:
        raise OpenELMError(
            f"{integers[0]} in {path} has dtype {tensors[integers[0]].dtype}; use a "
            "file whose weights are not quantized."
        )
    weights = {ours: tensors[name] for ours, name in map_to_corenet(tensors).items()}
    config_path = find_config(path)
    config = None if config_path is None else OpenELMConfig.from_file(config_path)
    tied = config is None or config.share_input_output_layers
    if (
        tied
        and {HEAD, EMBEDDING} <= weights.keys()
        and is_copied_head(weights[HEAD], weights[EMBEDDING], Tensor.to)
    ):
        rows = len(weights.pop(HEAD))
        weights[EMBEDDING] = weights[EMBEDDING][:rows]
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if config is None or config_path is None:
        config = OpenELMConfig.from_shapes(shapes)
    elif EMBEDDING in weights:  # often with padding rows
        config = replace(config, vocab_size=len(weights[EMBEDDING]))
    expected = config.tensor_shapes()
    wrong = [n for n in expected | shapes if expected.get(n) != shapes.get(n)]
    if wrong:
        beside = f"its {config_path.name}" if config_path else "OpenELM's sizes"
        raise OpenELMError(
            f"{path} does not fit {beside}: {wrong[0]} has shape "
            f"{shapes.get(wrong[0], 'none')}, expected "
            f"{expected.get(wrong[0], 'no such tensor')}."
        )
    floats = {name: value.float() for name, value in weights.items()}
    return InitialWeights(config, floats, path.parent, (*notes, *left_out))
