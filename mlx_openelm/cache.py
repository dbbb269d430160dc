"""The decode loop's key-value cache.

It keeps mlx-lm's calling contract (`offset`, `update_and_fetch`), so the model takes
either. Keys are stored rotated.
"""

from typing import Protocol

import mlx.core as mx


class ModelCache(Protocol):
    """What the decode loop asks of a layer's cache, beside what the model does."""

    @property
    def offset(self) -> int: ...

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]: ...

    def can_trim(self, count: int) -> bool: ...

    def trim(self, count: int) -> None: ...

    @property
    def state(self) -> tuple[mx.array, ...]: ...


class KVCache:
    """One layer's keys and values, with room that grows in steps.

    Attributes:
        offset: tokens held.
    """

    step = 256  # tokens by which the room grows

    def __init__(self) -> None:
        self.offset = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, K, T, H); return all of them, (B, K, S, H)."""
        start, end = self.offset, self.offset + keys.shape[2]
        if self._keys is None or self._values is None or end > self._keys.shape[2]:
            self._grow(keys, values, end)
        assert self._keys is not None
        assert self._values is not None
        self._keys[..., start:end, :] = keys
        self._values[..., start:end, :] = values
        self.offset = end
        return self._keys[..., :end, :], self._values[..., :end, :]

    def can_trim(self, count: int) -> bool:
        """Whether the last `count` tokens can be forgotten."""
        return count <= self.offset

    def trim(self, count: int) -> None:
        """Forget the last `count` tokens."""
        self.offset -= min(count, self.offset)

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The arrays to evaluate."""
        return tuple(a for a in (self._keys, self._values) if a is not None)

    def _grow(self, keys: mx.array, values: mx.array, end: int) -> None:
        B, K, _, H = keys.shape
        room = -(-end // self.step) * self.step - self.offset
        for name, like in (("_keys", keys), ("_values", values)):
            held: mx.array | None = getattr(self, name)
            fresh = mx.zeros((B, K, room, H), like.dtype)
            if held is not None:
                held = mx.concatenate([held[..., : self.offset, :], fresh], axis=2)
            setattr(self, name, fresh if held is None else held)


class SlotCache:
    """One layer's keys and values in a fixed number of slots S, of B sequences.

    Each sequence stands at a place of its own, and a step changes no shape: so it can
    be compiled, and sequences of different lengths can go through it together.

    Attributes:
        keys, values: (B, K, S, H); what stands behind a sequence's end is not seen.
        offset: tokens that each sequence holds, (B,). The caller advances it, once for
            all layers.
    """

    def __init__(self, keys: mx.array, values: mx.array, offset: mx.array) -> None:
        self.keys, self.values, self.offset = keys, values, offset

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Put keys and values (B, K, T, H) behind each end; return all slots."""
        self.keys = _place(self.keys, keys, self.offset)
        self.values = _place(self.values, values, self.offset)
        return self.keys, self.values

    def make_mask(
        self, num_tokens: int, return_array: bool, window_size: int | None
    ) -> mx.array:
        """Return which slots each new token sees, (B, 1, T, S)."""
        places = self.offset[:, None] + mx.arange(num_tokens)  # (B, T)
        slots = mx.arange(self.keys.shape[2])
        return (slots <= places[..., None])[:, None]


def _place(slots: mx.array, new: mx.array, offset: mx.array) -> mx.array:
    B, _, T, _ = new.shape
    if B == 1:
        return mx.slice_update(slots, new, offset, axes=(2,))
    places = offset[:, None] + mx.arange(T)  # (B, T)
    rows = mx.arange(B)[:, None]
    slots[rows, :, places] = new.swapaxes(1, 2)
    return slots
