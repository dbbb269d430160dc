"""The decode loop's KV caches.

They have mlx-lm's interface (`offset`, `update_and_fetch`), so the model takes either.
Keys are stored rotated.
"""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx


class ModelCache(Protocol):
    """A layer's cache, as the decode loop uses it."""

    @property
    def offset(self) -> int: ...

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]: ...

    def append(self, *parts: mx.array) -> None: ...

    def can_trim(self, count: int) -> bool: ...

    def trim(self, count: int) -> None: ...

    @property
    def state(self) -> tuple[mx.array, ...]: ...

    @property
    def newest(self) -> tuple[mx.array, ...]: ...


class GrowingCache:
    """One layer's tokens in arrays (B, K, S, any), whose capacity S grows in steps.

    Attributes:
        offset: number of tokens stored.
        newest: what was appended last, if it was a single token.
    """

    step = 256  # tokens by which the capacity grows

    def __init__(self) -> None:
        self.offset = 0
        self.newest: tuple[mx.array, ...] = ()
        self._parts: list[mx.array] = []

    def append(self, *parts: mx.array) -> None:
        """Append tokens: arrays (B, K, T, any) in the order of `state`."""
        start, end = self.offset, self.offset + parts[0].shape[2]
        if not self._parts or end > self._parts[0].shape[2]:
            self._grow(parts, end)
        for part, new in zip(self._parts, parts, strict=True):
            part[..., start:end, :] = new
        self.offset = end
        self.newest = parts if end == start + 1 else ()

    def stored(self) -> list[mx.array]:
        """Return the arrays without their unused capacity."""
        return [part[..., : self.offset, :] for part in self._parts]

    def can_trim(self, count: int) -> bool:
        """Whether the last `count` tokens can be removed."""
        return count <= self.offset

    def trim(self, count: int) -> None:
        """Remove the last `count` tokens."""
        self.offset -= min(count, self.offset)

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The arrays to evaluate."""
        return tuple(self._parts)

    def _grow(self, like: Sequence[mx.array], end: int) -> None:
        size = _round_up(end, self.step)
        self._parts = _with_capacity(self.stored(), like, like[0].shape[0], size)


class KVCache(GrowingCache):
    """One layer's keys and values."""

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, K, T, H); return all of them, (B, K, S, H)."""
        self.append(keys, values)
        all_keys, all_values = self.stored()
        return all_keys, all_values

    def reserve_slots(self, count: int = 1) -> tuple[mx.array, mx.array]:
        """Return all slots of a non-empty cache, with at least `count` free."""
        if self.offset + count > self._parts[0].shape[2]:
            self._grow(self._parts, self.offset + count)
        keys, values = self._parts
        return keys, values

    def set_slots(self, keys: mx.array, values: mx.array, count: int = 1) -> None:
        """Replace the slots by these, which hold `count` tokens more."""
        self._parts = [keys, values]
        self.offset += count


class SlotCache:
    """One layer's keys and values of a batch of sequences of different lengths.

    Every sequence has a row of slots. A step adds a token to each of the first R rows.
    Rows and slots grow with what they hold.

    The caller sets the attributes before each step, in all layers.

    Attributes:
        rows: numbers of these rows, (R,).
        offset: number of tokens in each of them, (R,).
        reach: number of slots that a step attends to; more than any row holds.
        newest: the keys and values of the last step.
    """

    step = 256  # slots by which the rows grow

    def __init__(self) -> None:
        self.rows = self.offset = mx.zeros((0,), mx.int32)
        self.reach = 1
        self.newest: tuple[mx.array, ...] = ()
        self._parts: list[mx.array] = []

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Append keys and values (R, K, 1, H) to each row.

        Returns:
            The rows' keys and values, (R, K, reach, H), to be masked by `make_mask`.
        """
        rows = keys.shape[0]
        self.newest = keys, values
        self._reserve((keys, values), rows, self.reach)
        for slots, new in zip(self._parts, (keys, values), strict=True):
            slots[self.rows, :, self.offset] = new.squeeze(2)
        all_keys, all_values = self._parts
        return all_keys[:rows, :, : self.reach], all_values[:rows, :, : self.reach]

    def make_mask(
        self, num_tokens: int, return_array: bool, window_size: int | None
    ) -> mx.array:
        """Return which slots the new token of each row sees, (R, 1, 1, reach)."""
        return (mx.arange(self.reach) <= self.offset[:, None])[:, None, None]

    def reserve(self, rows: int) -> tuple[mx.array, mx.array]:
        """Return all slots of a cache that is not empty, with at least these rows."""
        self._reserve(self._parts, rows, self.reach)
        keys, values = self._parts
        return keys, values

    def set_slots(self, keys: mx.array, values: mx.array) -> None:
        """Replace the slots by these, which hold a token more in each row."""
        self._parts = [keys, values]

    def put(self, row: int, keys: mx.array, values: mx.array) -> None:
        """Set the content of a row to keys and values (1, K, T, H)."""
        length = keys.shape[2]
        self._reserve((keys, values), row + 1, length)
        for slots, new in zip(self._parts, (keys, values), strict=True):
            slots[row : row + 1, :, :length] = new

    def take(self, row: int, length: int) -> tuple[mx.array, mx.array]:
        """Return the first `length` keys and values of a row, (1, K, length, H)."""
        keys, values = (part[row : row + 1, :, :length] for part in self._parts)
        return keys, values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of a row to another row."""
        for slots in self._parts:
            slots[target, :, :length] = slots[source, :, :length]

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The arrays to evaluate, (rows, K, slots, H) each."""
        return tuple(self._parts)

    def _reserve(self, like: Sequence[mx.array], rows: int, slots: int) -> None:
        """Grow to at least so many rows and slots; rows grow to a power of two."""
        old_rows, _, old_slots, _ = (
            self._parts[0].shape if self._parts else (0, 0, 0, 0)
        )
        if rows <= old_rows and slots <= old_slots:
            return
        rows = max(old_rows, 1 << (rows - 1).bit_length())
        slots = max(old_slots, _round_up(slots, self.step))
        parts = []
        for i, part in enumerate(like):
            grown = mx.zeros((rows, part.shape[1], slots, part.shape[3]), part.dtype)
            if self._parts:
                grown[:old_rows, :, :old_slots] = self._parts[i]
            parts.append(grown)
        self._parts = parts


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _with_capacity(
    parts: Sequence[mx.array], like: Sequence[mx.array], rows: int, size: int
) -> list[mx.array]:
    """Return arrays (rows, K, size, any): the parts, if any, padded with zeros."""
    added = size - (parts[0].shape[2] if parts else 0)
    zeros = [mx.zeros((rows, p.shape[1], added, p.shape[3]), p.dtype) for p in like]
    if not parts:
        return zeros
    pairs = zip(parts, zeros, strict=True)
    return [mx.concatenate(list(pair), axis=2) for pair in pairs]
