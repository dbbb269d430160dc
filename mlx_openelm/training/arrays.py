"""Helpers for arrays and trees of arrays: flattening, digests, scalars."""

import hashlib
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


def flatten(tree: Any) -> dict[str, mx.array]:
    """Return the arrays of a tree by path."""
    return dict(tree_flatten(tree))


def trained_tensors(model: nn.Module) -> dict[str, mx.array]:
    """Return the trainable parameters by name."""
    return flatten(model.trainable_parameters())


def digest_arrays(arrays: Mapping[str, mx.array]) -> str:
    """Return the SHA-256 of named arrays, converted to float32."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.array(arrays[name].astype(mx.float32)).tobytes())
    return digest.hexdigest()


def to_float(array: mx.array) -> float:
    """Return the value of an array with one element."""
    return float(array.item())  # type: ignore[arg-type] # not complex
