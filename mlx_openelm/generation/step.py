"""The decode step: one token through the model.

On a GPU its graph is compiled once and reused for every token, which saves the host the
work of building it. On the CPU mx.compile runs the C++ compiler for seconds and gains
little (benchmarks/decoding.py), so each step builds its graph.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_openelm.device import runs_on_gpu
from mlx_openelm.generation.cache import KVCache, ModelCache
from mlx_openelm.model.kernels import use_decoding_threads
from mlx_openelm.model.openelm import OpenELM

# Takes a token (1,) and the caches, to which it adds; returns logits (1, V).
Step = Callable[[mx.array, Sequence[ModelCache]], mx.array]


def choose_step(model: OpenELM) -> Step:
    """Return the faster step on this device."""
    return compiled_step(model) if runs_on_gpu() else plain_step(model)


def plain_step(model: OpenELM) -> Step:
    """Return a step that attends to the tokens in the cache."""

    def step(token: mx.array, cache: Sequence[ModelCache]) -> mx.array:
        use_decoding_threads(model.config)
        return model.head(model.transformer(token[None], cache)[:, -1])

    return step


def compiled_step(model: OpenELM) -> Step:
    """Return a step that attends to all slots of a cache, so that its shapes are fixed.

    It is compiled once for every 256 tokens of capacity. With other caches than
    `KVCache` it is the plain step.
    """

    @mx.compile
    def forward(
        token: mx.array, offset: mx.array, *slots: mx.array
    ) -> tuple[mx.array, ...]:
        cache = [
            _FixedSlots(keys, values, offset)
            for keys, values in zip(slots[::2], slots[1::2], strict=True)
        ]
        logits = model.head(model.transformer(token[None], cache)[:, -1])
        return logits, *(a for layer in cache for a in (layer.keys, layer.values))

    plain = plain_step(model)

    def step(token: mx.array, cache: Sequence[ModelCache]) -> mx.array:
        use_decoding_threads(model.config)
        layers = [layer for layer in cache if type(layer) is KVCache]
        if len(layers) < len(cache):
            return plain(token, cache)
        offset = mx.array([layers[0].offset])
        slots = [array for layer in layers for array in layer.reserve_slot()]
        logits, *slots = forward(token, offset, *slots)
        for layer, keys, values in zip(layers, slots[::2], slots[1::2], strict=True):
            layer.set_slots(keys, values)
        return logits

    return step


class _FixedSlots:
    """One layer's slots for keys and values, (1, K, S, H).

    Attributes:
        offset: number of slots in use, (1,).
    """

    def __init__(self, keys: mx.array, values: mx.array, offset: mx.array) -> None:
        self.keys, self.values, self.offset = keys, values, offset

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Add a token's keys and values (1, K, 1, H); return all slots."""
        self.keys = mx.slice_update(self.keys, keys, self.offset, axes=(2,))
        self.values = mx.slice_update(self.values, values, self.offset, axes=(2,))
        return self.keys, self.values

    def make_mask(
        self, num_tokens: int, return_array: bool, window_size: int | None
    ) -> mx.array:
        """Return the mask of the token, (1, 1, 1, S)."""
        return (mx.arange(self.keys.shape[2]) <= self.offset)[None, None, None]
