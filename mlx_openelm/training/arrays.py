"""Trees of arrays: flattened by path, and digested."""

import hashlib
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten


def flatten(tree: Any) -> dict[str, mx.array]:
    """Return the arrays of a tree by their path."""
    return dict(tree_flatten(tree))


def digest_arrays(arrays: Mapping[str, mx.array]) -> str:
    """Return the SHA-256 of named arrays, as float32."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.array(arrays[name].astype(mx.float32)).tobytes())
    return digest.hexdigest()
