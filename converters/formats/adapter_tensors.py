"""The tensors of an adapter's file: sorted by module, checked against each other.

LoRA (Hu et al., arXiv 2106.09685) adds scale * (A B)^T to a linear's weight; DoRA (Liu
et al., arXiv 2402.09353) then stretches each row to the length m. An embedding gets
scale * A B. Letters, in mlx-lm's order:

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
from converters.formats.pt_reader import read_state_dict
from converters.formats.tensor_readers import read_pt_tensor, read_safetensor
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.model_folder import MOST_NAMED, read_headers
from mlx_openelm.tensor_names import EMBEDDING, to_corenet

Method = Literal["lora", "dora"]

TABLE = EMBEDDING.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """An adapted linear, or the adapted embedding.

    Attributes:
        shape: of the base's weight: (O, I), of an embedding (V, D).
        scale: multiplies A B; it is alpha / rank where a file says alpha.
        read: "a", "b" and, where it is DoRA, "m" (O,); float32 and finite.
    """

    rank: int
    shape: tuple[int, int]
    scale: float
    method: Method
    is_embedding: bool
    read: Callable[[], dict[str, mx.array]]

    @property
    def part_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what `read` gives."""
        inputs, outputs = self.shape if self.is_embedding else self.shape[::-1]
        shapes = {"a": (inputs, self.rank), "b": (self.rank, outputs)}
        return {**shapes, "m": (outputs,)} if self.method == "dora" else {**shapes}

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.part_shapes.values())


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A tensor of an adapter's file; `read` gives it as stored."""

    shape: tuple[int, ...]
    read: Callable[[], mx.array]


@dataclass(frozen=True, slots=True)
class PartName:
    """What a tensor's name says.

    Attributes:
        target: the module's path as the file spells it.
        part: "a", "b" or "m".
        adapter: its name, where the file tells it (CoreNet's do).
    """

    target: str
    part: str
    is_embedding: bool
    is_transposed: bool
    adapter: str | None = None

    @property
    def module(self) -> str:
        """The module's path as CoreNet spells it."""
        return to_corenet(f"{self.target}.weight").removesuffix(".weight")


_TORCH_NAME = re.compile(
    r"(?P<target>[\w.]+)\.(?:"
    r"lora_(?P<linear>[AB])(?:\.(?P<name>\w+))?\.weight|"
    r"lora_(?:embedding_(?P<embedding>[AB])|magnitude_vector)"
    r"(?:\.(?P<other_name>(?!weight$)\w+))?(?:\.weight)?)"
)
_MLX_NAME = re.compile(r"(?P<target>[\w.]+)\.(?:lora_(?P<factor>[ab])|m)")


def parse_torch_name(name: str) -> PartName | None:
    """Read a name of PEFT's or of CoreNet's port of it; None: it is no adapter's."""
    found = _TORCH_NAME.fullmatch(name)
    if found is None:
        return None
    factor = found["linear"] or found["embedding"]
    return PartName(
        found["target"],
        factor.lower() if factor else "m",
        is_embedding=found["embedding"] is not None,
        is_transposed=factor is not None,
        adapter=found["name"] or found["other_name"],
    )


def parse_mlx_name(name: str) -> PartName | None:
    """Read a name of mlx-lm's; None: it is no adapter's."""
    found = _MLX_NAME.fullmatch(name)
    if found is None:
        return None
    target, factor = found["target"], found["factor"]
    is_embedding = bool(factor) and target.endswith(TABLE)
    return PartName(target, factor or "m", is_embedding, is_transposed=False)


@dataclass(slots=True)
class AdapterParts:
    """An adapter's tensors, and all that is wrong with them.

    Attributes:
        by_module: part -> tensor, in mlx-lm's order, by CoreNet's path of the module.
        targets: the modules' paths as the file spells them.
    """

    by_module: dict[str, dict[str, StoredPart]] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, name: PartName, stored: StoredPart) -> None:
        module = name.module
        parts = self.by_module.setdefault(module, {})
        self.targets[module] = name.target
        if name.part in parts:
            self.problems.append(f"{module} has {_SAID[name.part]} twice")
        if name.is_embedding != (module == TABLE and name.part != "m"):
            other = "an embedding" if name.is_embedding else "a linear"
            self.problems.append(f"{module} is adapted as if it were {other}")
        if name.is_transposed:
            stored = StoredPart(stored.shape[::-1], _transposed(stored))
        parts[name.part] = stored

    def assemble(self, scale: float) -> dict[str, AdapterModule]:
        """Return the modules that are whole, layer by layer."""
        modules = {}
        for name in sorted(self.by_module, key=_spread_numbers):
            module = self._assemble(name, self.by_module[name], scale)
            if module is not None:
                modules[name] = module
        return modules

    def _assemble(
        self, name: str, parts: Mapping[str, StoredPart], scale: float
    ) -> AdapterModule | None:
        missing = [_SAID[part] for part in ("a", "b") if part not in parts]
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
        """Raise OpenELMError if anything is wrong, or if there is nothing at all."""
        if not self.by_module:
            self.problems.append("it holds no adapter")
        if self.problems:
            said, more = self.problems[:MOST_NAMED], len(self.problems) - MOST_NAMED
            raise OpenELMError(
                f"{path} is no LoRA or DoRA adapter of an OpenELM, or not all of one: "
                f"{'; '.join(said)}{f'; and {more} more' if more > 0 else ''}; copy it "
                "again from where it was trained."
            )


_SAID = {"a": "A", "b": "B", "m": "a magnitude"}


def _spread_numbers(name: str) -> str:
    """Layer 10 comes after layer 9."""
    return re.sub("[0-9]+", lambda found: found[0].zfill(4), name)


def _transposed(stored: StoredPart) -> Callable[[], mx.array]:
    return lambda: stored.read().T


def _reader(
    module: str, parts: Mapping[str, StoredPart]
) -> Callable[[], dict[str, mx.array]]:
    def read() -> dict[str, mx.array]:
        arrays = {name: part.read().astype(mx.float32) for name, part in parts.items()}
        if not all(mx.isfinite(array).all().item() for array in arrays.values()):
            raise OpenELMError(
                f"The adapter of {module} holds NaN or infinity, so it gives no text; "
                "use one that was saved earlier."
            )
        return arrays

    return read


# Files ---------------------------------------------------------------------------


def read_parts(path: Path) -> dict[str, StoredPart]:
    """Return the tensors of a .safetensors or torch file by name, none of them read.

    Raises:
        OpenELMError: the file is damaged, or something in it is no floating-point.
    """
    if path.suffix != ".safetensors":
        return {n: read_torch(t, n, path) for n, t in read_state_dict(path).items()}
    headers = read_headers([path])
    for name, header in headers.items():
        _check_dtype(header.dtype, ("F32", "F16", "BF16"), name, path)
    return {
        name: StoredPart(header.shape, partial(read_safetensor, path, name))
        for name, header in headers.items()
    }


def read_torch(tensor: PtTensor, name: str, path: Path) -> StoredPart:
    """Return a tensor of a torch file; errors as `read_parts`."""
    allowed = ("float32", "float16", "bfloat16", "float64")
    _check_dtype(tensor.dtype, allowed, name, path)
    return StoredPart(tensor.shape, partial(read_pt_tensor, tensor))


def _check_dtype(dtype: str, allowed: tuple[str, ...], name: str, path: Path) -> None:
    if dtype not in allowed:
        raise OpenELMError(
            f"{path}: {name} is stored as {dtype}; an adapter is stored as "
            f"{', '.join(allowed)}."
        )
