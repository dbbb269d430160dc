"""The primitives of a graph as a GPU evaluates them.

On the CPU, MLX's fused operations are written out in elementary ones. Here a single
primitive stands in for each of them, so the graphs have as many as those of a GPU.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import mlx.core as mx

from mlx_openelm.model import joined_heads, kernels

# They give a buffer another shape or other strides, or only order the work.
VIEWS = {
    *("Reshape", "Transpose", "Split", "Slice", "Broadcast", "ExpandDims", "Squeeze"),
    *("Flatten", "Unflatten", "Depends", "StopGradient", "CustomTransforms"),
}


@dataclass(frozen=True)
class Primitive:
    name: str
    dtypes: frozenset[mx.Dtype]  # of inputs and outputs


def _one(x: mx.array, *needed: object) -> mx.array:
    """One primitive with the shape of x that needs other arrays, too."""
    return mx.depends(
        mx.negative(x), [x, *(a for a in needed if isinstance(a, mx.array))]
    )


@contextmanager
def fused_operations() -> Iterator[None]:
    """Replace MLX's fused operations by single primitives."""
    stand_ins = {
        "rms_norm": lambda x, weight, eps: _one(x, weight),
        "rope": lambda x, H, *, offset, **_: _one(x, offset),
        "scaled_dot_product_attention": lambda q, k, v, *, mask, **_: _one(
            q, k, v, mask
        ),
        "cross_entropy": lambda logits, targets: _one(
            logits.astype(mx.float32)[..., 0], logits, targets
        ),
    }
    with (
        mock.patch.multiple(mx.fast, **stand_ins),
        mock.patch.object(kernels, "_compiled_swiglu", _one),
        mock.patch.object(joined_heads, "_rotate_elements", _one),
    ):
        yield


def primitives_of(function: Callable, *arrays: mx.array) -> list[Primitive]:
    """Return the primitives of a function's graph.

    Custom gradients cannot be exported: of a graph that has some, these are its
    primitives without dtypes, and those of the graph with MLX's gradients instead.
    """
    found: list[Primitive] = []

    def collect(part: dict) -> None:
        if part["type"] == "primitive":
            ends = [*part["inputs"], *part["outputs"]]
            found.append(Primitive(part["name"], frozenset(end[2] for end in ends)))

    try:
        mx.export_function(collect, function, *arrays)
    except ValueError:
        with tempfile.NamedTemporaryFile(suffix=".dot") as file:
            mx.export_to_dot(file.name, *function(*arrays))
            names = re.findall(r'label ="([A-Za-z]+)', Path(file.name).read_text())
        with mock.patch.object(mx, "custom_function", _WithoutGradient):
            mx.export_function(collect, function, *arrays)
        found += [Primitive(name, frozenset()) for name in names]
    return found


class _WithoutGradient:
    """Stands in for `mx.custom_function`: the gradient is that of the function."""

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *arrays: mx.array) -> object:
        return self._function(*arrays)

    def vjp(self, gradient: Callable) -> Callable:
        return gradient


def count_compiled(graph: Callable, *arguments: object) -> int:
    """Return how many primitives a graph has when it is compiled, without views.

    A concatenation counts as a copy of each of its arrays.
    """
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, *mx.compile(graph)(*arguments))
        text = Path(file.name).read_text()
    nodes = re.findall(r'(\d+) \[label ="([A-Za-z]+)', text)
    inputs = Counter(re.findall(r"-> (\d+)", text))
    return sum(
        inputs[node] if name == "Concatenate" else name not in VIEWS
        for node, name in nodes
    )


def work_of(primitives: list[Primitive]) -> int:
    """Return how many primitives are not views."""
    return sum(primitive.name not in VIEWS for primitive in primitives)
