"""What tells one model's weights from another's, at the speed of memory.

Every bit of every weight counts: the columns and the rows of each tensor are summed
up as whole numbers and the sums are hashed. That takes as long as reading the memory
twice (0.2 s for a gigabyte on the Linux CPU); hashing all would take four times as
long. It finds other weights and damage; it is no guard against forgery.
"""

import hashlib
import json
from collections.abc import Mapping

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_openelm.model.lora import LoRAEmbedding, LoRALinear
from mlx_openelm.model.openelm import OpenELM

_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}  # by bytes


def fingerprint_model(model: OpenELM) -> str:
    """Return a fingerprint of a model as it computes: its adapter and dtype count."""
    scales = {
        path: module.scale
        for path, module in model.named_modules()
        if isinstance(module, LoRALinear | LoRAEmbedding)
    }
    said = json.dumps([repr(model.config), scales])
    return fingerprint_arrays(dict(tree_flatten(model.parameters())), said)


def fingerprint_arrays(arrays: Mapping[str, mx.array], said: str = "") -> str:
    """Return a fingerprint of arrays, their names, and of what is said of them."""
    names = sorted(arrays)
    sums = [_sum_up(arrays[name]) for name in names]
    mx.eval(sums)
    digest = hashlib.sha256(said.encode())
    for name, total in zip(names, sums, strict=True):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        for part in total:
            digest.update(np.array(part).tobytes())
    return digest.hexdigest()


def _sum_up(array: mx.array) -> tuple[mx.array, mx.array]:
    """Return the sums of the columns and, since rows may change places, of the rows."""
    width = max(1, array.shape[-1]) if array.ndim else 1
    bits = array.reshape(array.size // width, width).view(_UNSIGNED[array.dtype.size])
    numbers = bits.astype(mx.uint32)
    return numbers.sum(axis=0), numbers.sum(axis=1)
