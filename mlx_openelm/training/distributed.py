"""Collective operations of the processes that train one model together."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_openelm.errors import OpenELMError


@dataclass(frozen=True, slots=True)
class World:
    """The process group of `mx.distributed`; without a launcher, this process alone."""

    rank: int
    size: int

    @classmethod
    def join(cls) -> "World":
        group = mx.distributed.init()
        return cls(group.rank(), group.size())

    def sum(self, array: mx.array) -> mx.array:
        """Return the sum of the array over all processes."""
        return mx.distributed.all_sum(array) if self.size > 1 else array

    def broadcast(self, array: mx.array) -> mx.array:
        """Return rank 0's array; other ranks pass one of the same shape and dtype."""
        return self.sum(array if self.rank == 0 else mx.zeros_like(array))

    def broadcast_text(self, text: str) -> str:
        """Return rank 0's text."""
        if self.size == 1:
            return text
        encoded = np.frombuffer(f"{text}\n".encode(), np.uint8).astype(np.int32)
        length = int(np.array(self.broadcast(mx.array(len(encoded)))))
        received = self.broadcast(mx.array(np.resize(encoded, length)))
        return np.array(received).astype(np.uint8).tobytes().decode()[:-1]


def run_on_first_rank(world: World, action: Callable[[], None]) -> None:
    """Run a function on rank 0; if it fails, end all processes.

    Raises:
        OpenELMError: on rank 0, the error of `action`.
        SystemExit: on the other ranks.
    """
    error: OpenELMError | None = None
    try:
        if world.rank == 0:
            action()
    except OpenELMError as raised:
        error = raised
    if world.broadcast_text("failed" if error else "passed") == "failed":
        raise error or SystemExit(1)
