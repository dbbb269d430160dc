"""Tensors of an adapter file, grouped by module and checked for consistency.

LoRA (Hu et al., arXiv 2106.09685) adds scale * (A B)^T to a linear's weight; DoRA (Liu
et al., arXiv 2402.09353) then scales each row to the length m. To an embedding, scale *
A B is added. Letters, in mlx-lm's order:

    I  inputs of a linear     R  rank                  V  rows of the embedding
    O  outputs of a linear    A (I, R), B (R, O)       D  its width; A (V, R), B (R, D)

torch's files (CoreNet's, PEFT's) hold A and B transposed.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import mlx.core as mx

from converters.formats.pickle_machine import PtTensor
from converters.formats.pt_reader import read_checkpoint
from converters.formats.tensor_readers import note_float64, read_pt_tensor
from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import list_names
from mlx_openelm.storage.model_folder import MOST_NAMED
from mlx_openelm.storage.weight_reader import read_headers
from mlx_openelm.tensor_names import EMBEDDING, split_buffers, to_corenet

Method = Literal["lora", "dora"]

TABLE = EMBEDDING.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """An adapted linear, or the adapted embedding.

    Attributes:
        shape: of the base's weight: (O, I); of an embedding: (V, D).
        scale: factor of A B; alpha / rank for files with alpha.
        read: returns "a", "b" and, for DoRA, "m" (O,); float32 and finite.
    """

    rank: int
    shape: tuple[int, int]
    scale: float
    method: Method
    is_embedding: bool
    read: Callable[[], dict[str, mx.array]]

    @property
    def part_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays that `read` returns."""
        inputs, outputs = self.shape if self.is_embedding else self.shape[::-1]
        shapes = {"a": (inputs, self.rank), "b": (self.rank, outputs)}
        return {**shapes, "m": (outputs,)} if self.method == "dora" else {**shapes}

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.part_shapes.values())


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A tensor of an adapter file; `read` returns it, float64 as float32."""

    shape: tuple[int, ...]
    read: Callable[[], mx.array]
    is_float64: bool = False


@dataclass(frozen=True, slots=True)
class PartName:
    """The parsed name of a tensor.

    Attributes:
        target: the module's path in the file.
        part: "a", "b" or "m".
        adapter: the adapter's name, which only CoreNet's files contain.
        with_tied_head: of an embedding: a tied head changes too, as in mlx-lm.
    """

    target: str
    part: str
    is_embedding: bool
    is_transposed: bool
    adapter: str | None = None
    with_tied_head: bool = False

    @property
    def module(self) -> str:
        """The module's path in CoreNet."""
        return to_corenet(f"{self.target}.weight").removesuffix(".weight")


_TORCH_NAME = re.compile(
    r"(?P<target>[\w.]+)\.(?:"
    r"lora_(?P<linear>[AB])(?:\.(?P<name>\w+))?\.weight|"
    r"lora_(?:embedding_(?P<embedding>[AB])|magnitude_vector)"
    r"(?:\.(?P<other_name>(?!weight$)\w+))?(?:\.weight)?)"
)
_MLX_NAME = re.compile(
    r"(?P<target>[\w.]+)\.(?:lora_(?P<inputs>embedding_)?(?P<factor>[ab])|m)"
)


def parse_torch_name(name: str) -> PartName | None:
    """Parse a name in PEFT's or CoreNet's style; None if it is not an adapter's."""
    match = _TORCH_NAME.fullmatch(name)
    if match is None:
        return None
    factor = match["linear"] or match["embedding"]
    return PartName(
        match["target"],
        factor.lower() if factor else "m",
        is_embedding=match["embedding"] is not None,
        is_transposed=factor is not None,
        adapter=match["name"] or match["other_name"],
    )


def parse_mlx_name(name: str) -> PartName | None:
    """Parse a name in mlx-lm's style; None if it is not an adapter's.

    Our `lora_embedding_a` and `lora_embedding_b` are those of inputs alone.
    """
    match = _MLX_NAME.fullmatch(name)
    if match is None:
        return None
    target, factor = match["target"], match["factor"]
    is_embedding = bool(match["inputs"] or (factor and target.endswith(TABLE)))
    return PartName(
        target,
        factor or "m",
        is_embedding,
        is_transposed=False,
        with_tied_head=is_embedding and not match["inputs"],
    )


@dataclass(slots=True)
class AdapterParts:
    """An adapter's tensors, and the problems in them.

    Attributes:
        by_module: part -> tensor, in mlx-lm's order, by CoreNet's path of the module.
        targets: the modules' paths in the file.
    """

    by_module: dict[str, dict[str, StoredPart]] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, name: PartName, stored: StoredPart) -> None:
        module = name.module
        parts = self.by_module.setdefault(module, {})
        self.targets[module] = name.target
        if name.part in parts:
            self.problems.append(f"{module} has {_PART_NAMES[name.part]} twice")
        if name.is_embedding != (module == TABLE and name.part != "m"):
            other = "an embedding" if name.is_embedding else "a linear"
            self.problems.append(f"{module} has an adapter for {other}")
        if name.is_transposed:
            stored = StoredPart(stored.shape[::-1], _transposed(stored))
        parts[name.part] = stored

    def assemble(self, scale: float) -> dict[str, AdapterModule]:
        """Return the complete modules, ordered by layer."""
        modules = {}
        for name in sorted(self.by_module, key=_pad_numbers):
            module = self._assemble(name, self.by_module[name], scale)
            if module is not None:
                modules[name] = module
        return modules

    def _assemble(
        self, name: str, parts: Mapping[str, StoredPart], scale: float
    ) -> AdapterModule | None:
        missing = [_PART_NAMES[part] for part in ("a", "b") if part not in parts]
        if missing:
            self.problems.append(f"{name} lacks {' and '.join(missing)}")
            return None
        a, b, m = parts["a"].shape, parts["b"].shape, parts.get("m")
        if not len(a) == len(b) == 2 or a[1] != b[0] or 0 in a + b:
            self.problems.append(
                f"{name} has A {list(a)} and B {list(b)}, which have no product"
            )
            return None
        shape = (a[0], b[1]) if name == TABLE else (b[1], a[0])
        if m and name == TABLE:
            self.problems.append(f"{name} has a magnitude, but DoRA is for linears")
        elif m and m.shape != shape[:1]:
            self.problems.append(
                f"{name} has a magnitude {list(m.shape)} for {shape[0]} outputs"
            )
        return AdapterModule(
            rank=a[1],
            shape=shape,
            scale=scale,
            method="dora" if m else "lora",
            is_embedding=name == TABLE,
            read=_reader(name, parts),
        )

    def refuse_problems(self, path: Path) -> None:
        """Raise OpenELMError if there are problems or no tensors."""
        if not self.by_module:
            self.problems.append("it holds no adapter")
        if self.problems:
            listed = list_names(
                self.problems, most=MOST_NAMED, quoted=False, separator="; "
            )
            raise OpenELMError(
                f"{path} is not a complete LoRA or DoRA adapter of an OpenELM: "
                f"{listed}; copy it again from the training machine."
            )


_PART_NAMES = {"a": "A", "b": "B", "m": "a magnitude"}


def _pad_numbers(name: str) -> str:
    """Return a sort key that orders layer 10 after layer 9."""
    return re.sub("[0-9]+", lambda match: match[0].zfill(4), name)


def _transposed(stored: StoredPart) -> Callable[[], mx.array]:
    return lambda: stored.read().T


def _reader(
    module: str, parts: Mapping[str, StoredPart]
) -> Callable[[], dict[str, mx.array]]:
    def read() -> dict[str, mx.array]:
        arrays = {name: part.read().astype(mx.float32) for name, part in parts.items()}
        if not all(mx.isfinite(array).all().item() for array in arrays.values()):
            raise OpenELMError(
                f"The adapter of {module} holds NaN or infinity; use an earlier "
                "checkpoint."
            )
        return arrays

    return read


# Files ---------------------------------------------------------------------------


def read_parts(path: Path) -> tuple[dict[str, StoredPart], tuple[str, ...]]:
    """Return the tensors of a .safetensors or torch file, which are not read yet.

    Returns:
        The tensors by name, and notes for the user on which they are.

    Raises:
        OpenELMError: the file is damaged, or a tensor is not floating-point.
    """
    parts: dict[str, StoredPart] = {}
    if path.suffix == ".safetensors":
        headers, notes = split_buffers(read_headers([path]))
        for name, header in headers.items():
            _check_dtype(header.dtype, ("F32", "F16", "BF16", "F64"), name, path)
            is_float64 = header.dtype == "F64"
            parts[name] = StoredPart(header.shape, header.read, is_float64)
    else:
        checkpoint = read_checkpoint(path)
        tensors, left_out = split_buffers(checkpoint.tensors)
        parts = {name: read_torch(one, name, path) for name, one in tensors.items()}
        notes = (*checkpoint.notes, *left_out)
    rounded = note_float64(sum(part.is_float64 for part in parts.values()))
    return parts, (*notes, *rounded)


def read_torch(tensor: PtTensor, name: str, path: Path) -> StoredPart:
    """Return a tensor of a torch file. Raises as `read_parts`."""
    allowed = ("float32", "float16", "bfloat16", "float64")
    _check_dtype(tensor.dtype, allowed, name, path)
    is_float64 = tensor.dtype == "float64"
    return StoredPart(tensor.shape, partial(read_pt_tensor, tensor), is_float64)


def _check_dtype(dtype: str, allowed: tuple[str, ...], name: str, path: Path) -> None:
    if dtype not in allowed:
        raise OpenELMError(
            f"{path}: {name} is stored as {dtype}; expected {', '.join(allowed)}."
        )
