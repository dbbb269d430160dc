"""The bits of each tensor; `packed_weights` does the quantization.

Linears and the embedding are quantized, norms never. The embedding has its own number
of bits: it is small, and as the output head the most sensitive to errors.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import list_names
from mlx_openelm.tensor_names import EMBEDDING, HEAD, to_module

EMBED_BITS = 8  # default
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (64, 32, 128)  # of the affine mode, the default first
FIXED_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group size
MODES = ("affine", *FIXED_MODES)


@dataclass(frozen=True, slots=True)
class Packing:
    """How one tensor is stored: `bits` per weight, a scale and a bias per group."""

    bits: int
    group_size: int
    mode: str = "affine"

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parts of a packed weight (out, in), by suffix."""
        out, width = shape
        scales = (out, width // self.group_size)
        parts: dict[str, tuple[int, ...]] = {
            "weight": (out, width * self.bits // 32),
            "scales": scales,
        }
        return parts | ({"biases": scales} if self.mode == "affine" else {})


@dataclass(frozen=True, slots=True)
class Quantization:
    """The quantization of a whole model.

    Attributes:
        bits: bits of the linears; default 4, or those of the mode.
        group_size: weights that share a scale; default 64, or that of the mode.
        embed_bits: bits of the embedding and of an untied head, always affine.
        keep: regular expression; modules with a matching path are not quantized.
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
            valid_bits: tuple[int, ...] = (bits,)
            valid_sizes: tuple[int, ...] = (group_size,)
        else:
            valid_bits, valid_sizes = AFFINE_BITS, tuple(sorted(GROUP_SIZES))
        for name, value, valid in (
            ("bits", self.bits, valid_bits),
            ("group_size", self.group_size, valid_sizes),
            ("embed_bits", self.embed_bits, AFFINE_BITS),
        ):
            if value is not None and value not in valid:
                owner = "MLX" if self.mode == "affine" else f"`mode` {self.mode}"
                raise OpenELMError(
                    f"`{name}` is {value}; {owner} has {', '.join(map(str, valid))}."
                )
        try:
            re.compile(self.keep or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise OpenELMError(
                f"`keep` {self.keep!r} is not a regular expression: {error}."
            ) from error

    @property
    def linear(self) -> Packing:
        """The packing of the linears."""
        bits, group_size = FIXED_MODES.get(self.mode, (4, GROUP_SIZES[0]))
        return Packing(self.bits or bits, self.group_size or group_size, self.mode)

    def packings(self, config: OpenELMConfig) -> dict[str, Packing]:
        """Return the packing of each tensor that is quantized, by CoreNet name.

        Raises:
            OpenELMError: a group size does not divide the rows of a tensor (all are
                named), or `keep` matches nothing.
        """
        packings = {}
        indivisible = []
        for name, (*rows, width) in config.tensor_shapes().items():
            if not rows or self.keeps(name):
                continue
            packing = self.linear
            if name in (EMBEDDING, HEAD):
                packing = Packing(self.embed_bits, self._embedding_group_size(width))
            if width % packing.group_size:
                indivisible.append(f"{name} ({width})")
            packings[name] = packing
        if indivisible:
            raise OpenELMError(
                f"A group size of {self.linear.group_size} does not divide the rows of "
                f"{list_names(indivisible, quoted=False)}; choose another `group_size` "
                f"({', '.join(map(str, sorted(GROUP_SIZES)))}), or `keep` them."
            )
        self.check_keep(config)
        return packings

    def keeps(self, name: str) -> bool:
        """Return whether `keep` matches the module of a tensor (CoreNet name)."""
        return bool(self.keep and re.search(self.keep, to_module(name)))

    def check_keep(self, config: OpenELMConfig) -> None:
        """Raise OpenELMError if `keep` matches no module that would be quantized."""
        modules = [n for n, shape in config.tensor_shapes().items() if len(shape) == 2]
        if self.keep and not any(map(self.keeps, modules)):
            raise OpenELMError(
                f"`keep` {self.keep!r} matches no module; module paths look like "
                f"{', '.join(to_module(name) for name in modules[:5])}."
            )

    def _embedding_group_size(self, width: int) -> int:
        if self.mode == "affine":
            return self.linear.group_size
        return next((size for size in GROUP_SIZES if width % size == 0), GROUP_SIZES[0])


def describe_packings(
    packings: Mapping[str, Packing], config: OpenELMConfig
) -> dict[str, Any]:
    """Return config.json's "quantization": the commonest packing, then exceptions."""
    linears = [p for n, p in packings.items() if n not in (EMBEDDING, HEAD)]
    (commonest, _), *_ = Counter(linears or packings.values()).most_common(1)
    entry = asdict(commonest)
    for name, shape in config.tensor_shapes().items():
        packing = packings.get(name)
        if len(shape) == 2 and packing != commonest:
            entry[to_module(name)] = asdict(packing) if packing else False
    return entry


def read_packing(entry: Mapping[str, Any], module_path: str) -> Packing:
    """Return the packing of a module, from config.json's "quantization".

    Raises:
        OpenELMError: the entry is damaged, or MLX does not support it.
    """
    exception = entry.get(module_path) if isinstance(entry, Mapping) else None
    values = exception if isinstance(exception, Mapping) else entry
    try:
        packing = Packing(
            bits=int(values["bits"]),
            group_size=int(values["group_size"]),
            mode=str(values.get("mode", entry.get("mode", "affine"))),
        )
        sizes = (packing.bits, packing.group_size)
        if packing.mode == "affine":
            valid = packing.bits in AFFINE_BITS and packing.group_size in GROUP_SIZES
        else:
            valid = sizes == FIXED_MODES.get(packing.mode)
        if not valid:
            raise ValueError(packing)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise OpenELMError(
            f"config.json's quantization of {module_path} is {values!r}; expected "
            f"bits, group_size and a mode of MLX ({', '.join(MODES)})."
        ) from error
    return packing
