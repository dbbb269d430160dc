"""Prefix sharing: keys and values of processed prompts, kept in a radix tree.

A node holds the tokens that its prompts have in common beyond its parent's, with their
keys and values. A new prompt starts from the longest prefix that the tree holds (as
RadixAttention: Zheng et al., SGLang, 2312.07104). The least recently used leaves go
when a limit is reached.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

SHORTEST = 32  # tokens; a shorter prefix is neither kept nor looked up


@dataclass(frozen=True, slots=True)
class PrefixLimits:
    """Limits of the tree.

    Attributes:
        prompts: maximum number of kept prompts (leaves of the tree).
        bytes: maximum size of all keys and values.
    """

    prompts: int = 64
    bytes: int = 2**30


@dataclass(eq=False, slots=True)
class _Node:
    """Tokens (T,) after those of the parent, with their keys and values.

    Attributes:
        parts: two arrays (1, K, T, H) per layer.
    """

    ids: np.ndarray
    parts: list[mx.array]
    parent: "_Node | None"
    used: int = 0
    children: "dict[int, _Node]" = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class PrefixTree:
    """Processed prompts of several models, with common prefixes stored once.

    Attributes:
        nbytes: size of all keys and values.
        version: changes with the content.
    """

    def __init__(self, limits: PrefixLimits) -> None:
        self._limits = limits
        self._roots: dict[str, _Node] = {}
        self._clock = 0
        self.nbytes = self.version = 0

    def match(self, model: str, ids: np.ndarray) -> int:
        """Return how many of the first tokens the tree holds; 0 below `SHORTEST`."""
        length = sum(common for _, common in self._walk(model, ids))
        return length if length >= SHORTEST else 0

    def fetch(self, model: str, ids: np.ndarray) -> list[mx.array]:
        """Return keys and values of the first `match` tokens, two arrays per layer."""
        path = list(self._walk(model, ids))
        self._clock += 1
        for node, _ in path:
            node.used = self._clock
        pieces = zip(
            *([part[..., :common, :] for part in node.parts] for node, common in path),
            strict=True,
        )
        return [mx.concatenate(list(piece), axis=2) for piece in pieces]

    def insert(self, model: str, ids: np.ndarray, parts: Sequence[mx.array]) -> None:
        """Keep a prompt of which `parts` are the keys and values, if it is new.

        Args:
            parts: two arrays (1, K, T, H) per layer, of all its T tokens.
        """
        if len(ids) < SHORTEST or self._limits.prompts < 1:
            return
        if sum(part.nbytes for part in parts) > self._limits.bytes:
            return
        self._clock += 1
        node = self._roots.setdefault(model, _Node(ids[:0], [], None))
        length = 0
        for child, common in list(self._walk(model, ids)):
            child.used = self._clock
            node, length = child, length + common
            if common < len(child.ids):
                node = self._split(child, common)
        if length < len(ids):
            own = [mx.contiguous(part[..., length:, :]) for part in parts]
            mx.eval(own)
            leaf = _Node(ids[length:], own, node, self._clock)
            node.children[int(ids[length])] = leaf
            self.nbytes += leaf.nbytes
            self.version += 1
        self._evict()

    def _walk(self, model: str, ids: np.ndarray) -> Iterator[tuple[_Node, int]]:
        """Yield the nodes of the longest known prefix, and how much of each it has."""
        node = self._roots.get(model)
        while node is not None and len(ids):
            node = node.children.get(int(ids[0]))
            if node is None:
                return
            common = common_prefix(node.ids, ids)
            yield node, common
            if common < len(node.ids):
                return
            ids = ids[common:]

    def _split(self, node: _Node, length: int) -> _Node:
        """Divide a node; return the new parent, which has its first tokens."""
        assert node.parent is not None
        first = [mx.contiguous(part[..., :length, :]) for part in node.parts]
        rest = [mx.contiguous(part[..., length:, :]) for part in node.parts]
        mx.eval(first, rest)
        parent = _Node(node.ids[:length], first, node.parent, node.used)
        node.parent.children[int(node.ids[0])] = parent
        node.ids, node.parts, node.parent = node.ids[length:], rest, parent
        parent.children[int(node.ids[0])] = node
        return parent

    def _evict(self) -> None:
        """Remove the least recently used leaves until the limits hold."""
        while leaves := list(self._leaves()):
            if len(leaves) <= self._limits.prompts and (
                self.nbytes <= self._limits.bytes
            ):
                return
            leaf = min(leaves, key=lambda node: node.used)
            assert leaf.parent is not None
            del leaf.parent.children[int(leaf.ids[0])]
            self.nbytes -= leaf.nbytes
            self.version += 1

    def _leaves(self) -> Iterator[_Node]:
        waiting = [*self._roots.values()]
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            if not node.children and node.parent is not None:
                yield node


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many first elements are equal."""
    length = min(len(a), len(b))
    unequal = np.flatnonzero(a[:length] != b[:length])
    return int(unequal[0]) if len(unequal) else length
