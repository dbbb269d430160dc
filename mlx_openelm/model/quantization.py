"""Which tensor gets how many bits; `packed_weights` computes them.

Linears and the embedding are quantized, norms never. The embedding is also the output
head, where errors cost most, and small: it has bits of its own, 8 unless said.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.tensor_names import EMBEDDING, HEAD, to_module

EMBED_BITS = 8  # unless said
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (64, 32, 128)  # of the affine mode, the usual one first
FIXED_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group size
MODES = ("affine", *FIXED_MODES)


@dataclass(frozen=True, slots=True)
class Packing:
    """How one tensor is stored: `bits` a weight, a scale and a bias for each group."""

    bits: int
    group_size: int
    mode: str = "affine"

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a packed weight (out, in)'s parts, by suffix."""
        out, width = shape
        scales = (out, width // self.group_size)
        parts: dict[str, tuple[int, ...]] = {
            "weight": (out, width * self.bits // 32),
            "scales": scales,
        }
        return parts | ({"biases": scales} if self.mode == "affine" else {})


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a person asks for.

    Attributes:
        bits: of the linears; default 4, or what the mode has.
        group_size: weights that share a scale; default 64, or what the mode has.
        embed_bits: of the embedding and of an untied head, always affine.
        keep: a regular expression; modules whose path it finds stay as they are.
    """

    bits: int | None = None
    group_size: int | None = None
    embed_bits: int = EMBED_BITS
    mode: str = "affine"
    keep: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise OpenELMError(f"`mode` is {self.mode}; MLX has {', '.join(MODES)}.")
        if self.mode in FIXED_MODES:
            bits, group_size = FIXED_MODES[self.mode]
            known_bits: tuple[int, ...] = (bits,)
            known_sizes: tuple[int, ...] = (group_size,)
        else:
            known_bits, known_sizes = AFFINE_BITS, tuple(sorted(GROUP_SIZES))
        for name, value, known in (
            ("bits", self.bits, known_bits),
            ("group_size", self.group_size, known_sizes),
            ("embed_bits", self.embed_bits, AFFINE_BITS),
        ):
            if value is not None and value not in known:
                has = "MLX" if self.mode == "affine" else f"`mode` {self.mode}"
                raise OpenELMError(
                    f"`{name}` is {value}; {has} has {', '.join(map(str, known))}."
                )
        try:
            re.compile(self.keep or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise OpenELMError(
                f"`keep` {self.keep!r} is no regular expression: {error}."
            ) from error

    @property
    def linear(self) -> Packing:
        """How a linear is packed."""
        bits, group_size = FIXED_MODES.get(self.mode, (4, GROUP_SIZES[0]))
        return Packing(self.bits or bits, self.group_size or group_size, self.mode)

    def packings(self, config: OpenELMConfig) -> dict[str, Packing]:
        """Return the packing of each tensor that is quantized, by CoreNet name.

        Raises:
            OpenELMError: a group size does not divide some tensor's rows (all named),
                or `keep` finds nothing.
        """
        chosen = {}
        indivisible = []
        for name, (*rows, width) in config.tensor_shapes().items():
            if not rows or self.keeps(name):
                continue
            packing = self.linear
            if name in (EMBEDDING, HEAD):
                packing = Packing(self.embed_bits, self._table_group(width))
            if width % packing.group_size:
                indivisible.append(f"{name} ({width})")
            chosen[name] = packing
        if indivisible:
            raise OpenELMError(
                f"A group size of {self.linear.group_size} does not divide the rows of "
                f"{', '.join(indivisible)}; choose another `group_size` "
                f"({', '.join(map(str, sorted(GROUP_SIZES)))}), or `keep` them."
            )
        self.check_keep(config)
        return chosen

    def keeps(self, name: str) -> bool:
        """Whether `keep` finds the module of a tensor (CoreNet name)."""
        return bool(self.keep and re.search(self.keep, to_module(name)))

    def check_keep(self, config: OpenELMConfig) -> None:
        """Raise OpenELMError if `keep` finds no module that would be quantized."""
        modules = [n for n, shape in config.tensor_shapes().items() if len(shape) == 2]
        if self.keep and not any(map(self.keeps, modules)):
            raise OpenELMError(
                f"`keep` {self.keep!r} finds no module; there are "
                f"{', '.join(to_module(name) for name in modules[:5])} and the like."
            )

    def _table_group(self, width: int) -> int:
        if self.mode == "affine":
            return self.linear.group_size
        return next((size for size in GROUP_SIZES if width % size == 0), GROUP_SIZES[0])


def describe_packings(
    packings: Mapping[str, Packing], config: OpenELMConfig
) -> dict[str, Any]:
    """Return config.json's "quantization": the commonest packing, then exceptions."""
    linears = [p for n, p in packings.items() if n not in (EMBEDDING, HEAD)]
    (usual, _), *_ = Counter(linears or packings.values()).most_common(1)
    entry = asdict(usual)
    for name, shape in config.tensor_shapes().items():
        packing = packings.get(name)
        if len(shape) == 2 and packing != usual:
            entry[to_module(name)] = asdict(packing) if packing else False
    return entry


def read_packing(entry: Mapping[str, Any], module_path: str) -> Packing:
    """Return how config.json's "quantization" says that a module is packed."""
    own = entry.get(module_path) if isinstance(entry, Mapping) else None
    chosen = own if isinstance(own, Mapping) else entry
    try:
        packing = Packing(
            bits=int(chosen["bits"]),
            group_size=int(chosen["group_size"]),
            mode=str(chosen.get("mode", entry.get("mode", "affine"))),
        )
        sizes = (packing.bits, packing.group_size)
        if packing.mode == "affine":
            known = packing.bits in AFFINE_BITS and packing.group_size in GROUP_SIZES
        else:
            known = sizes == FIXED_MODES.get(packing.mode)
        if not known:
            raise ValueError(packing)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise OpenELMError(
            f"config.json's quantization of {module_path} is {chosen!r}; expected "
            f"bits, group_size and a mode that MLX has ({', '.join(MODES)})."
        ) from error
    return packing
