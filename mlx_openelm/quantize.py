"""Which tensor gets how many bits.

Linears and the embedding are quantized, norms never. The embedding is also the output
head, where errors cost most, and small: it has bits of its own, 8 unless said.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.names import EMBEDDING, HEAD, to_folder

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")  # that a folder may be packed in


@dataclass(frozen=True, slots=True)
class Packing:
    """How one tensor is stored: `bits` a weight, a scale and a bias for each group."""

    bits: int
    group_size: int
    mode: str = "affine"

    def pack(self, weight: mx.array) -> dict[str, mx.array]:
        """Return the packed weight and what decodes it, by the suffix of its name."""
        packed = mx.quantize(
            weight, group_size=self.group_size, bits=self.bits, mode=self.mode
        )
        return dict(zip(("weight", "scales", "biases"), packed, strict=False))

    def unpack(self, parts: Mapping[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """Return the weight (out, in) that the packed parts stand for."""
        return mx.dequantize(
            parts["weight"],
            parts["scales"],
            parts.get("biases"),
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=dtype,
        )


@dataclass(frozen=True, slots=True)
class Quantization:
    """Bits for the linears and for the embedding, and the group that shares a scale."""

    bits: int = 4
    group_size: int = 64
    embed_bits: int = 8

    def __post_init__(self) -> None:
        for flag, value, known in (
            ("--q-bits", self.bits, AFFINE_BITS),
            ("--q-embed-bits", self.embed_bits, AFFINE_BITS),
            ("--q-group-size", self.group_size, GROUP_SIZES),
        ):
            if value not in known:
                raise OpenELMError(
                    f"{flag} is {value}; MLX has {', '.join(map(str, known))}."
                )

    def packings(self, config: OpenELMConfig) -> dict[str, Packing]:
        """Return the packing of each tensor that is quantized, by CoreNet name.

        Raises:
            OpenELMError: the group size does not divide some tensor's rows (all named).
        """
        chosen: dict[str, Packing] = {}
        indivisible = []
        for name, shape in config.tensor_shapes().items():
            if len(shape) != 2:
                continue
            if shape[-1] % self.group_size:
                indivisible.append(f"{name} ({shape[-1]})")
            table = name in (EMBEDDING, HEAD)
            bits = self.embed_bits if table else self.bits
            chosen[name] = Packing(bits, self.group_size)
        if indivisible:
            raise OpenELMError(
                f"A group size of {self.group_size} does not divide the rows of "
                f"{', '.join(indivisible)}; choose another --q-group-size "
                f"({', '.join(map(str, GROUP_SIZES))})."
            )
        return chosen

    def to_dict(self, packings: Mapping[str, Packing]) -> dict[str, Any]:
        """Return the "quantization" entry of config.json, exceptions by module path."""
        entry: dict[str, Any] = {
            "bits": self.bits,
            "group_size": self.group_size,
            "mode": "affine",
        }
        for name, packing in packings.items():
            if packing.bits != self.bits:
                path = to_folder(name).removesuffix(".weight")
                entry[path] = {
                    "bits": packing.bits,
                    "group_size": packing.group_size,
                    "mode": packing.mode,
                }
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
        if packing.bits < 1 or packing.group_size < 1 or packing.mode not in MODES:
            raise ValueError(packing)
    except (KeyError, TypeError, ValueError) as error:
        raise OpenELMError(
            f"config.json's quantization of {module_path} is {chosen!r}; expected "
            f"bits, group_size and a mode ({', '.join(MODES)})."
        ) from error
    return packing
