"""The decode loop's key-value cache.

It keeps mlx-lm's calling contract (`offset`, `update_and_fetch`), so the model takes
either. Keys are stored rotated.
"""

from typing import Self

import mlx.core as mx

from mlx_openelm.model import OpenELM


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

    @classmethod
    def for_model(cls, model: OpenELM) -> list[Self]:
        """Return an empty cache for each layer."""
        return [cls() for _ in model.layers]
