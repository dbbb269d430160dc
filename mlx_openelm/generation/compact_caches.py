"""Caches that keep less of a text: packed in a few bits, or a window that slides."""

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.cache import GrowingCache, KVCache, ModelCache
from mlx_openelm.generation.options import CacheOptions
from mlx_openelm.model.packed_weights import pack_weight, unpack_weight
from mlx_openelm.model.quantization import Packing

KV_BITS = (4, 8)
KV_GROUP_SIZES = (32, 64, 128)  # that MLX packs
KEPT_FIRST = 4  # tokens: attention leans on the first ones, whatever they say


class QuantizedKVCache(GrowingCache):
    """One layer's keys and values in 4 or 8 bits, unpacked whenever they are read.

    `state` has the words, scales and biases of the keys, then those of the values.

    Attributes:
        packing: of each head's vector, in groups with a scale and a bias.
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
        held = self.held()
        return self._unpack(held[:3], keys.dtype), self._unpack(held[3:], keys.dtype)

    def _unpack(self, parts: Sequence[mx.array], dtype: mx.Dtype) -> mx.array:
        named = dict(zip(("weight", "scales", "biases"), parts, strict=True))
        return unpack_weight(self.packing, named, dtype)


class SlidingKVCache(KVCache):
    """One layer's first tokens and its newest ones; a text may go on for ever.

    A token sees the first `keep` tokens and the newest before it, itself included,
    `max_size` in all, whatever chunks the text came in. The newest stand in a ring.

    Attributes:
        offset: tokens that went through, the forgotten ones included.
    """

    def __init__(self, max_size: int, keep: int = KEPT_FIRST) -> None:
        super().__init__()
        self.max_size, self.keep = max_size, keep
        self._ring = max_size - keep

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Take keys and values (B, K, T, H); return what the T tokens see of them.

        Returns:
            each (B, K, S, H); `make_mask`, asked before, says which token sees which.
        """
        end = self.offset + keys.shape[2]
        if end <= self.max_size:
            return super().update_and_fetch(keys, values)
        held = self._parts or [new[..., :0, :] for new in (keys, values)]
        slid_keys, seen_keys = self._slide(held[0], keys)
        slid_values, seen_values = self._slide(held[1], values)
        self._parts, self.offset = [slid_keys, slid_values], end
        return seen_keys, seen_values

    def make_mask(
        self, num_tokens: int, return_array: bool, window_size: int | None
    ) -> mx.array | str | None:
        """Return which keys each new token sees, (T, S), where that is not plain."""
        start, end = self.offset, self.offset + num_tokens
        if num_tokens == 1:
            return None
        if end <= self.max_size:
            return "causal"
        queries = np.arange(start, end)[:, None]
        slots = np.arange(min(start, self.max_size))
        newest = start - 1 - (start - 1 - slots) % self._ring
        held = np.where(slots < self.keep, slots, newest)
        keys = np.concatenate([held, np.arange(start, end)])
        near = (keys < self.keep) | (keys > queries - self._ring)
        return mx.array((keys <= queries) & near)

    def can_trim(self, count: int) -> bool:
        """Whether the last `count` tokens can be forgotten: not once it has slid."""
        return count == 0 or count <= self.offset <= self.max_size

    def _slide(self, slots: mx.array, new: mx.array) -> tuple[mx.array, mx.array]:
        """Return the slots with the new ones among them, and what those see."""
        B, K, T, H = new.shape
        known = slots[..., : min(self.offset, self.max_size), :]
        seen = mx.concatenate([known, new], axis=2)
        room = self.max_size - slots.shape[2]
        if room:  # the first time; the steps in which room grows may lead behind it
            fresh = mx.zeros((B, K, max(room, 0), H), new.dtype)
            slots = mx.concatenate([slots[..., : self.max_size, :], fresh], axis=2)
        places = self.offset + np.arange(T)
        stay = (places < self.keep) | (places >= self.offset + T - self._ring)
        chosen = places[stay]
        at = np.where(
            chosen < self.keep, chosen, self.keep + (chosen - self.keep) % self._ring
        )
        if T == 1:
            slots[..., at[0] : at[0] + 1, :] = new
            return slots, slots
        slots[:, :, mx.array(at)] = new[:, :, mx.array(chosen - self.offset)]
        return slots, seen


def cache_maker(
    config: OpenELMConfig, options: CacheOptions
) -> Callable[[], ModelCache]:
    """Return what makes a layer's cache, as the options say.

    Raises:
        OpenELMError: there is no such cache for this model.
    """
    kv_bits, kv_group_size = options.kv_bits, options.kv_group_size
    max_kv_size = options.max_kv_size
    if kv_bits is not None and max_kv_size is not None:
        raise OpenELMError(
            "A cache slides or is packed in a few bits; leave out `kv_bits` or "
            "`max_kv_size`."
        )
    if max_kv_size is not None:
        if max_kv_size <= KEPT_FIRST:
            raise OpenELMError(
                f"`max_kv_size` {max_kv_size} is too small: the first {KEPT_FIRST} "
                f"tokens always stay; say {KEPT_FIRST + 1} or more."
            )
        return partial(SlidingKVCache, max_kv_size)
    if kv_bits is None:
        return KVCache
    if kv_bits not in KV_BITS:
        raise OpenELMError(f"`kv_bits` is {' or '.join(map(str, KV_BITS))}.")
    fitting = [size for size in KV_GROUP_SIZES if config.head_dim % size == 0]
    if kv_group_size not in fitting:
        raise OpenELMError(
            f"`kv_group_size` {kv_group_size} does not fit this model, whose heads are "
            f"{config.head_dim} wide; "
            + (f"say {' or '.join(map(str, fitting))}." if fitting else "none does.")
        )
    return partial(QuantizedKVCache, kv_bits, kv_group_size)


def describe_cache(cache: ModelCache) -> str:
    """Return in what form a cache keeps keys and values."""
    if isinstance(cache, QuantizedKVCache):
        packing = cache.packing
        return f"{packing.bits} bits in groups of {packing.group_size}"
    if isinstance(cache, SlidingKVCache):
        return f"a window of {cache.max_size} tokens"
    return "full width"
