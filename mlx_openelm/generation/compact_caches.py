"""Compact KV caches: quantized, or a sliding window with attention sinks."""

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.cache import GrowingCache, KVCache, ModelCache, split_pair
from mlx_openelm.generation.options import CacheOptions
from mlx_openelm.model.packed_weights import pack_weight, unpack_weight
from mlx_openelm.model.quantization import Packing

KV_BITS = (4, 8)
KV_GROUP_SIZES = (32, 64, 128)  # supported by MLX
KEPT_FIRST = 4  # attention sinks: first tokens, which a sliding cache keeps


class QuantizedKVCache(GrowingCache):
    """One layer's keys and values in 4 or 8 bits, dequantized at every step.

    `state` has the words, scales and biases of the keys, then those of the values.

    Attributes:
        packing: bits and group size; a group shares a scale and a bias.
    """

    def __init__(self, bits: int = 8, group_size: int = 64) -> None:
        super().__init__()
        self.packing = Packing(bits, group_size)

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, K, T, H); return all of them, (B, K, S, H)."""
        packed_keys, packed_values = (
            pack_weight(self.packing, x) for x in (keys, values)
        )
        self.append(*packed_keys.values(), *packed_values.values())
        parts = self.stored()
        return self._unpack(parts[:3], keys.dtype), self._unpack(parts[3:], keys.dtype)

    def _unpack(self, parts: Sequence[mx.array], dtype: mx.Dtype) -> mx.array:
        named = dict(zip(("weight", "scales", "biases"), parts, strict=True))
        return unpack_weight(self.packing, named, dtype)


class SlidingKVCache(KVCache):
    """One layer's first and newest tokens, for texts of unbounded length.

    A token attends to the first `keep` tokens and the newest ones up to itself,
    `max_size` in all, for any chunks. The newest are kept in a ring buffer.

    Attributes:
        offset: number of tokens processed, including those no longer stored.
    """

    _joined = True

    def __init__(self, max_size: int, keep: int = KEPT_FIRST) -> None:
        super().__init__()
        self.max_size, self.keep = max_size, keep
        self._ring = max_size - keep

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Call `update_pair` with keys and values (B, K, T, H)."""
        return self.update_pair(mx.stack([keys, values]))

    def update_pair(self, pair: mx.array) -> tuple[mx.array, mx.array]:
        """Add keys and values (2, B, K, T, H); return what the T tokens attend to.

        Returns:
            (B, K, S, H) each, to be masked by `make_mask`, which is called before.
        """
        end = self.offset + pair.shape[-2]
        if end <= self.max_size:
            return super().update_pair(pair)
        slots = self._parts[0] if self._parts else pair[..., :0, :]
        slid, seen = self._slide(slots, pair)
        self._parts, self.offset = [slid], end
        self.newest = (pair,) if pair.shape[-2] == 1 else ()
        return split_pair(seen)

    def make_mask(
        self, num_tokens: int, return_array: bool, window_size: int | None
    ) -> mx.array | str | None:
        """Return the mask (T, S) of the new tokens, "causal", or None for no mask."""
        start, end = self.offset, self.offset + num_tokens
        if num_tokens == 1:
            return None
        if end <= self.max_size:
            return "causal"
        queries = np.arange(start, end)[:, None]
        slots = np.arange(min(start, self.max_size))
        newest = start - 1 - (start - 1 - slots) % self._ring
        stored = np.where(slots < self.keep, slots, newest)  # position in each slot
        keys = np.concatenate([stored, np.arange(start, end)])
        near = (keys < self.keep) | (keys > queries - self._ring)
        return mx.array((keys <= queries) & near)

    def can_trim(self, count: int) -> bool:
        """Whether the last `count` tokens can be removed: not once it has slid."""
        return count == 0 or count <= self.offset <= self.max_size

    def _slide(self, slots: mx.array, new: mx.array) -> tuple[mx.array, mx.array]:
        """Return the slots with the new tokens, and what the new tokens attend to."""
        *leading, T, H = new.shape
        known = slots[..., : min(self.offset, self.max_size), :]
        seen = mx.concatenate([known, new], axis=-2)
        missing = self.max_size - slots.shape[-2]
        if missing:  # the first time; negative if the capacity grew beyond `max_size`
            zeros = mx.zeros((*leading, max(missing, 0), H), new.dtype)
            slots = mx.concatenate([slots[..., : self.max_size, :], zeros], axis=-2)
        places = self.offset + np.arange(T)
        stay = (places < self.keep) | (places >= self.offset + T - self._ring)
        chosen = places[stay]
        at = np.where(
            chosen < self.keep, chosen, self.keep + (chosen - self.keep) % self._ring
        )
        if T == 1:
            slots[..., at[0] : at[0] + 1, :] = new
            return slots, slots
        slots[..., mx.array(at), :] = new[..., mx.array(chosen - self.offset), :]
        return slots, seen


def cache_maker(
    config: OpenELMConfig, options: CacheOptions
) -> Callable[[], ModelCache]:
    """Return the constructor of a layer's cache.

    Raises:
        OpenELMError: the options are invalid, or do not fit this model.
    """
    kv_bits, kv_group_size = options.kv_bits, options.kv_group_size
    max_kv_size = options.max_kv_size
    if kv_bits is not None and max_kv_size is not None:
        raise OpenELMError(
            "A sliding cache cannot be quantized; pass `kv_bits` or `max_kv_size`, "
            "not both."
        )
    if max_kv_size is not None:
        if max_kv_size <= KEPT_FIRST:
            raise OpenELMError(
                f"`max_kv_size` is {max_kv_size}; it must be {KEPT_FIRST + 1} or more, "
                f"because the first {KEPT_FIRST} tokens are always kept."
            )
        return partial(SlidingKVCache, max_kv_size)
    if kv_bits is None:
        return KVCache
    if kv_bits not in KV_BITS:
        allowed = " or ".join(map(str, KV_BITS))
        raise OpenELMError(f"`kv_bits` is {kv_bits}; it must be {allowed}.")
    fitting = [size for size in KV_GROUP_SIZES if config.head_dim % size == 0]
    if kv_group_size not in fitting:
        allowed = " or ".join(map(str, fitting))
        raise OpenELMError(
            f"`kv_group_size` is {kv_group_size}, which does not fit this model's head "
            f"size of {config.head_dim}; "
            + (f"it must be {allowed}." if fitting else "leave out `kv_bits`.")
        )
    return partial(QuantizedKVCache, kv_bits, kv_group_size)


def describe_cache(cache: ModelCache) -> str:
    """Return the format in which a cache keeps keys and values."""
    if isinstance(cache, QuantizedKVCache):
        packing = cache.packing
        return f"{packing.bits} bits in groups of {packing.group_size}"
    if isinstance(cache, SlidingKVCache):
        return f"a window of {cache.max_size} tokens"
    return "full width"
