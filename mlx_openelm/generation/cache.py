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
        if self._keys is None or end > self._keys.shape[2]:
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

    def lend_slots(self) -> tuple[mx.array, mx.array]:
        """Return keys and values with room for a further token; it holds a token."""
        assert self._keys is not None
        assert self._values is not None
        if self.offset == self._keys.shape[2]:
            self._grow(self._keys, self._values, self.offset + 1)
        return self._keys, self._values

    def take_back(self, keys: mx.array, values: mx.array) -> None:
        """Take what was lent, with one token more."""
        self._keys, self._values = keys, values
        self.offset += 1

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
    """One layer's keys and values of many sequences, each of a length of its own.

    Every sequence has a row of slots. A step gives the first R rows one token each.

    Attributes:
        offset: tokens that each of these R rows holds, (R,). Whoever decodes sets it
            before a step, in all layers.
        reach: slots that a step looks at; more than any of the rows holds.
    """

    step = 256  # slots by which the rows grow

    def __init__(self, rows: int) -> None:
        self.offset, self.reach = mx.zeros((rows,), mx.int32), 1
        self._rows = rows
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Put keys and values (R, K, 1, H) behind each end; return what is in reach.

        Returns:
            (R, K, reach, H), of which `make_mask` tells what is seen.
        """
        held = self._make_room(keys, values, self.reach)
        rows = keys.shape[0]
        for slots, new in zip(held, (keys, values), strict=True):
            slots[mx.arange(rows), :, self.offset] = new.squeeze(2)
        all_keys, all_values = held
        return all_keys[:rows, :, : self.reach], all_values[:rows, :, : self.reach]

    def make_mask(
        self, num_tokens: int, return_array: bool, window_size: int | None
    ) -> mx.array:
        """Return which slots the new token of each row sees, (R, 1, 1, reach)."""
        return (mx.arange(self.reach) <= self.offset[:, None])[:, None, None]

    def put(self, row: int, keys: mx.array, values: mx.array) -> None:
        """Begin a row anew, with keys and values (1, K, T, H)."""
        length = keys.shape[2]
        for slots, new in zip(
            self._make_room(keys, values, length), (keys, values), strict=True
        ):
            slots[row : row + 1, :, :length] = new

    def move(self, source: int, target: int, length: int) -> None:
        """Let a row have what the first slots of another one hold."""
        for slots in self.state:
            slots[target, :, :length] = slots[source, :, :length]

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The arrays to evaluate, (rows, K, slots, H) each."""
        return tuple(a for a in (self._keys, self._values) if a is not None)

    def _make_room(
        self, keys: mx.array, values: mx.array, slots: int
    ) -> tuple[mx.array, mx.array]:
        self._keys = self._with_room(self._keys, keys, slots)
        self._values = self._with_room(self._values, values, slots)
        return self._keys, self._values

    def _with_room(self, held: mx.array | None, like: mx.array, slots: int) -> mx.array:
        there = 0 if held is None else held.shape[2]
        if held is not None and slots <= there:
            return held
        _, K, _, H = like.shape
        room = -(-slots // self.step) * self.step - there
        fresh = mx.zeros((self._rows, K, room, H), like.dtype)
        return fresh if held is None else mx.concatenate([held, fresh], axis=2)
