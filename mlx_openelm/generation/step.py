"""The decode step: one token through the model, and how its work is queued.

On a GPU its graph is compiled once and reused for every token, which saves the host the
work of building it. On the CPU mx.compile runs the C++ compiler for seconds and gains
little (benchmarks/decoding.py), so each step builds its graph.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from mlx_openelm.device import takes_gpu_path
from mlx_openelm.generation.cache import (
    KVCache,
    ModelCache,
    PairCache,
    SlotCache,
    split_pair,
)
from mlx_openelm.model.kernels import use_decoding_threads
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.tuning import AHEAD, STAGED, Tuning

# Takes T tokens (T,) and the caches, to which it adds; returns logits (T, V).
Step = Callable[[mx.array, Sequence[ModelCache]], mx.array]
# Takes the newest token of each row (R,) and the caches; returns logits (R, V).
BatchStep = Callable[[mx.array, Sequence[SlotCache]], mx.array]


def choose_step(model: OpenELM, tuning: Tuning) -> Step:
    """Return the step that the settings or the device choose."""
    return compiled_step(model) if _compiles(tuning) else plain_step(model)


def choose_batch_step(model: OpenELM, tuning: Tuning) -> BatchStep:
    """Return the step of a batch that the settings or the device choose."""
    return compiled_batch_step(model) if _compiles(tuning) else plain_batch_step(model)


def _compiles(tuning: Tuning) -> bool:
    return takes_gpu_path() if tuning.compiled is None else tuning.compiled


@contextmanager
def queued(
    results: Sequence[mx.array],
    cache: Sequence[ModelCache] | Sequence[SlotCache],
    queue: str,
) -> Iterator[None]:
    """Queue a step; in the body, the token of the step before it is read.

    MLX updates a cache in place only if nothing else holds its buffer, and a step in
    progress does: a step that is queued meanwhile may copy the cache. "staged" queues
    it only up to the first layer's keys and values before the token is read.
    """
    if queue == AHEAD:
        mx.async_eval(*results)
    elif queue == STAGED and results:
        mx.async_eval(*cache[0].newest)
    yield
    if queue != AHEAD:
        mx.async_eval(*results)


def plain_step(model: OpenELM) -> Step:
    """Return a step that attends to the tokens in the cache."""

    def step(tokens: mx.array, cache: Sequence[ModelCache]) -> mx.array:
        use_decoding_threads(model.config)
        return model.head(model.transformer(tokens[None], cache).squeeze(0))

    return step


def compiled_step(model: OpenELM) -> Step:
    """Return a step that attends to all slots of a cache, so that its shapes are fixed.

    It is compiled once for every 256 tokens of capacity and every power of two of
    tokens. With other caches than `KVCache` it is the plain step.
    """

    @mx.compile
    def forward(
        tokens: mx.array, offset: mx.array, *slots: mx.array
    ) -> tuple[mx.array, ...]:
        cache = [_FixedSlots(own, offset) for own in slots]
        logits = model.head(model.transformer(tokens[None], cache).squeeze(0))
        return logits, cache[0].newest, *(layer.slots for layer in cache)

    plain = plain_step(model)

    def step(tokens: mx.array, cache: Sequence[ModelCache]) -> mx.array:
        use_decoding_threads(model.config)
        layers = [layer for layer in cache if type(layer) is KVCache]
        if len(layers) < len(cache) or not layers[0].state:
            return plain(tokens, cache)
        count = tokens.size
        padded = 1 << (count - 1).bit_length()  # the slots of padding are written again
        offset = mx.array([layers[0].offset])
        slots = [layer.reserve_slots(padded) for layer in layers]
        tokens = mx.pad(tokens, (0, padded - count)) if padded > count else tokens
        logits, newest, *slots = forward(tokens, offset, *slots)
        layers[0].newest = (newest,)
        for layer, own in zip(layers, slots, strict=True):
            layer.set_slots(own, count)
        return logits[:count] if padded > count else logits

    return step


def plain_batch_step(model: OpenELM) -> BatchStep:
    """Return a step that attends to the slots of the rows in use."""

    def step(tokens: mx.array, cache: Sequence[SlotCache]) -> mx.array:
        use_decoding_threads(model.config)
        return model.head(model.transformer(tokens[:, None], cache)[:, -1])

    return step


def compiled_batch_step(model: OpenELM) -> BatchStep:
    """Return a step of all rows and slots of a batch, so that its shapes are fixed.

    Rows that are not in use have token 0 at offset 0, and their logits are left out. It
    is compiled once for every number of rows, a power of two, and of slots.
    """

    @mx.compile
    def forward(
        tokens: mx.array, offsets: mx.array, *slots: mx.array
    ) -> tuple[mx.array, ...]:
        cache = [_FixedRows(own, offsets) for own in slots]
        logits = model.head(model.transformer(tokens[:, None], cache)[:, -1])
        return logits, cache[0].newest, *(layer.slots for layer in cache)

    plain = plain_batch_step(model)

    def step(tokens: mx.array, cache: Sequence[SlotCache]) -> mx.array:
        use_decoding_threads(model.config)
        if not cache[0].state:  # before the first prompt of more than a token
            return plain(tokens, cache)
        rows = tokens.size
        slots = [layer.reserve(rows) for layer in cache]
        unused = [(0, slots[0].shape[1] - rows)]
        offsets = mx.pad(cache[0].offset, unused)
        logits, newest, *slots = forward(mx.pad(tokens, unused), offsets, *slots)
        cache[0].newest = (newest,)
        for layer, own in zip(cache, slots, strict=True):
            layer.set_slots(own)
        return logits[:rows]

    return step


class _FixedSlots(PairCache):
    """One layer's slots for keys and values, (2, B, K, S, H), in a compiled step.

    Attributes:
        offset: number of slots in use, (1,).
        newest: the keys and values that the step adds.
    """

    def __init__(self, slots: mx.array, offset: mx.array) -> None:
        self.slots, self.offset = slots, offset
        self.newest = slots[..., :0, :]

    def update_pair(self, pair: mx.array) -> tuple[mx.array, mx.array]:
        """Add keys and values (2, B, K, T, H); return all slots."""
        self.newest, self.slots = pair, self._add(pair)
        return split_pair(self.slots)

    def _add(self, pair: mx.array) -> mx.array:
        return mx.slice_update(self.slots, pair, self.offset, axes=(3,))

    def make_mask(
        self, num_tokens: int, return_array: bool, window_size: int | None
    ) -> mx.array:
        """Return which slots the new tokens attend to, (1, 1, T, S)."""
        last = self.offset + mx.arange(num_tokens)[:, None]  # (T, 1)
        return (mx.arange(self.slots.shape[3]) <= last)[None, None]


class _FixedRows(_FixedSlots):
    """One layer's slots of a batch; `offset` is that of each row, (R,)."""

    def _add(self, pair: mx.array) -> mx.array:
        places = mx.broadcast_to(self.offset[:, None, None, None], pair.shape)
        return mx.put_along_axis(self.slots, places, pair, axis=3)

    def make_mask(
        self, num_tokens: int, return_array: bool, window_size: int | None
    ) -> mx.array:
        """Return which slots the new token of each row attends to, (R, 1, 1, S)."""
        slots = mx.arange(self.slots.shape[3])
        return (slots <= self.offset[:, None])[:, None, None]
