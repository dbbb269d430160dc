"""The decode loop's KV caches.

They have mlx-lm's interface (`offset`, `update_and_fetch`), so the model takes either.
Keys are stored rotated.
"""

from abc import ABC, abstractmethod
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

    def stored(self) -> list[mx.array]: ...

    def can_trim(self, count: int) -> bool: ...

    def trim(self, count: int) -> None: ...

    @property
    def state(self) -> tuple[mx.array, ...]: ...

    @property
    def newest(self) -> tuple[mx.array, ...]: ...


class GrowingCache:
    """One layer's tokens in arrays (..., S, any), whose capacity S grows in steps.

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
        """Append tokens: arrays (..., T, any) in the order of `state`."""
        start, end = self.offset, self.offset + parts[0].shape[-2]
        if not self._parts or end > self._parts[0].shape[-2]:
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
        stored = [part[..., : self.offset, :] for part in self._parts]
        self._parts = [
            _with_capacity(stored[i] if stored else new[..., :0, :], size)
            for i, new in enumerate(like)
        ]


class PairCache(ABC):
    """A layer's cache that takes new keys and values in one array, (2, B, K, T, H)."""

    @abstractmethod
    def update_pair(self, pair: mx.array) -> tuple[mx.array, mx.array]:
        """Add keys and values; return those to attend to, (B, K, S, H) each."""

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Call `update_pair` with keys and values (B, K, T, H)."""
        return self.update_pair(mx.stack([keys, values]))


def split_pair(pair: mx.array) -> tuple[mx.array, mx.array]:
    """Return views of keys and values in one array, (2, B, K, S, H)."""
    keys, values = mx.split(pair, 2)
    return keys.squeeze(0), values.squeeze(0)  # an index would copy them


class KVCache(GrowingCache):
    """One layer's keys and values, (B, K, S, H) each.

    They are in one array, (2, B, K, S, H), once it is given new ones in one array. On a
    GPU that saves operations; on the CPU, where they are given apart, it would cost 5 %
    of the decode speed of the demo model (docs/performance.md).
    """

    _joined = False

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, K, T, H); return all of them, (B, K, S, H)."""
        self.append(keys, values)
        all_keys, all_values = self.stored()
        return all_keys, all_values

    def update_pair(self, pair: mx.array) -> tuple[mx.array, mx.array]:
        """Do as `update_and_fetch` with keys and values in one array."""
        self._join()
        super().append(pair)
        return split_pair(self._parts[0][..., : self.offset, :])

    def append(self, *parts: mx.array) -> None:
        """Append keys and values, (B, K, T, H) each."""
        if self._joined:
            super().append(mx.stack(list(parts)))
        else:
            super().append(*parts)

    def stored(self) -> list[mx.array]:
        """Return keys and values without their unused capacity."""
        stored = super().stored()
        return list(split_pair(stored[0])) if self._joined and stored else stored

    def reserve_slots(self, count: int = 1) -> mx.array:
        """Return all slots of a non-empty cache, with at least `count` free."""
        self._join()
        if self.offset + count > self._parts[0].shape[-2]:
            self._grow(self._parts, self.offset + count)
        return self._parts[0]

    def set_slots(self, slots: mx.array, count: int = 1) -> None:
        """Replace the slots by these, which hold `count` tokens more."""
        self._parts = [slots]
        self.offset += count

    def _join(self) -> None:
        if not self._joined and self._parts:
            self._parts = [mx.stack(self._parts)]
        self._joined = True


class SlotCache(PairCache):
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
        self._slots = mx.zeros((2, 0, 0, 0, 0))  # (2, rows, K, S, H)

    def update_pair(self, pair: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values (2, R, K, 1, H), one to each row.

        Returns:
            The rows' keys and values, (R, K, reach, H), to be masked by `make_mask`.
        """
        rows = pair.shape[1]
        self.newest = (pair,)
        self._reserve(pair, rows, self.reach)
        self._slots[:, self.rows, :, self.offset] = pair.squeeze(3).swapaxes(0, 1)
        return split_pair(self._slots[:, :rows, :, : self.reach])

    def make_mask(
        self, num_tokens: int, return_array: bool, window_size: int | None
    ) -> mx.array:
        """Return which slots the new token of each row sees, (R, 1, 1, reach)."""
        return (mx.arange(self.reach) <= self.offset[:, None])[:, None, None]

    def reserve(self, rows: int) -> mx.array:
        """Return all slots of a cache that is not empty, with at least these rows."""
        return self._reserve(self._slots, rows, self.reach)

    def set_slots(self, slots: mx.array) -> None:
        """Replace the slots by these, which hold a token more in each row."""
        self._slots = slots

    def put(self, row: int, keys: mx.array, values: mx.array) -> None:
        """Set the content of a row to keys and values (1, K, T, H)."""
        pair, length = mx.stack([keys, values]), keys.shape[2]
        self._reserve(pair, row + 1, length)
        self._slots[:, row : row + 1, :, :length] = pair

    def take(self, row: int, length: int) -> tuple[mx.array, mx.array]:
        """Return the first `length` keys and values of a row, (1, K, length, H)."""
        return split_pair(self._slots[:, row : row + 1, :, :length])

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of a row to another row."""
        self._slots[:, target, :, :length] = self._slots[:, source, :, :length]

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The arrays to evaluate."""
        return (self._slots,) if self._slots.size else ()

    def _reserve(self, like: mx.array, rows: int, slots: int) -> mx.array:
        """Grow to at least so many rows and slots; rows grow to a power of two."""
        _, old_rows, _, old_slots, _ = self._slots.shape
        if rows > old_rows or slots > old_slots:
            rows = max(old_rows, 1 << (rows - 1).bit_length())
            slots = max(old_slots, _round_up(slots, self.step))
            _, _, K, _, H = like.shape
            grown = mx.zeros((2, rows, K, slots, H), like.dtype)
            if old_rows:
                grown[:, :old_rows, :, :old_slots] = self._slots
            self._slots = grown
        return self._slots


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _with_capacity(part: mx.array, size: int) -> mx.array:
    """Return an array (..., size, any): the part (..., S, any), padded with zeros."""
    *leading, used, width = part.shape
    zeros = mx.zeros((*leading, size - used, width), part.dtype)
    return mx.concatenate([part, zeros], axis=-2) if used else zeros
