"""The processes that train one model together, by `mx.distributed`."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_openelm.errors import OpenELMError


@dataclass(frozen=True, slots=True)
class World:
    """The processes that train together, by `mx.distributed`; often just this one."""

    rank: int
    size: int

    @classmethod
    def join(cls) -> "World":
        group = mx.distributed.init()
        return cls(group.rank(), group.size())

    def sum(self, array: mx.array) -> mx.array:
        """Return the sum of every process's array."""
        return mx.distributed.all_sum(array) if self.size > 1 else array

    def from_first(self, array: mx.array) -> mx.array:
        """Return the first process's array; the others' may hold anything."""
        return self.sum(array if self.rank == 0 else mx.zeros_like(array))

    def tell(self, text: str) -> str:
        """Return the first process's text."""
        if self.size == 1:
            return text
        encoded = np.frombuffer(f"{text}\n".encode(), np.uint8).astype(np.int32)
        length = int(np.array(self.from_first(mx.array(len(encoded)))))
        heard = self.from_first(mx.array(np.resize(encoded, length)))
        return np.array(heard).astype(np.uint8).tobytes().decode()[:-1]


def run_on_first_rank(world: World, action: Callable[[], None]) -> None:
    """Run a function in the first process; if it fails, all of them end.

    Raises:
        OpenELMError: in the first process, as raised there.
        SystemExit: in the others.
    """
    error: OpenELMError | None = None
    try:
        if world.rank == 0:
            action()
    except OpenELMError as raised:
        error = raised
    if world.tell("failed" if error else "passed") == "failed":
        raise error or SystemExit(1)
