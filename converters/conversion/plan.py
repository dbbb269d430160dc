"""Plan of a conversion: shape, dtype and packing of every tensor to write."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from converters.formats.sources import ModelSource
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.packed_weights import pack_weight
from mlx_openelm.model.quantization import Packing
from mlx_openelm.storage.model_folder import (
    expected_shapes,
    is_finite,
    spell_dtype,
    unpacks_to_finite,
)
from mlx_openelm.storage.shards import TensorLayout
from mlx_openelm.tensor_names import EMBEDDING, HEAD, to_module

_DAMAGED = (
    "holds NaN or infinity, so the checkpoint is damaged or its training failed; "
    "download it again"
)


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """A source and the format of the result.

    Attributes:
        config: of the result; its vocabulary may be smaller than the source's.
        dtype: of tensors that are not packed.
        packings: of the packed tensors, by CoreNet name.
        learned: scales and biases that replace those of rounding, by suffix, of packed
            tensors by CoreNet name.
    """

    source: ModelSource
    config: OpenELMConfig
    dtype: mx.Dtype
    packings: Mapping[str, Packing]
    learned: Mapping[str, Mapping[str, mx.array]] = field(default_factory=dict)

    def layout(self) -> dict[str, TensorLayout]:
        """Return every tensor of the result by its name in a folder, in order."""
        dtypes: dict[str, mx.Dtype] = {}
        for name, packing in self.packings.items():
            dtypes[f"{to_module(name)}.weight"] = mx.uint32
            if packing.mode != "affine":
                dtypes[f"{to_module(name)}.scales"] = mx.uint8
        return {
            name: TensorLayout(dtypes.get(name, self.dtype), shape)
            for name, shape in expected_shapes(self.config, self.packings).items()
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of the result's tensors."""
        return sum(math.prod(t.shape) * t.dtype.size for t in self.layout().values())

    def estimate_bytes(self, bits_per_weight: float) -> int:
        """Return the bytes of a result with this average over all weights."""
        return int(self.config.num_parameters * bits_per_weight / 8)

    def part_names(self, name: str) -> list[str]:
        """Return the names under which a tensor (CoreNet name) is written."""
        packing, shape = self.packings.get(name), self.config.tensor_shapes()[name]
        suffixes = packing.part_shapes(shape) if packing else ("weight",)
        return [f"{to_module(name)}.{suffix}" for suffix in suffixes]

    def parts(self, name: str) -> dict[str, mx.array]:
        """Return the arrays to write for a tensor (CoreNet name), by name in a folder.

        Raises:
            OpenELMError: it holds NaN or infinity, or values beyond the range of its
                dtype or packing.
        """
        module = to_module(name)
        if name not in self.packings:
            return {f"{module}.weight": self.read(name)}
        parts = self.packed_parts(name)
        return {f"{module}.{suffix}": part for suffix, part in parts.items()}

    def packed_parts(self, name: str) -> dict[str, mx.array]:
        """Return the parts of a packed tensor, by suffix. Raises as `parts`."""
        packing, tensor = self.packings[name], self.source.tensors[name]
        if tensor.packing == packing and tensor.read_parts is not None:
            rows = self.config.tensor_shapes()[name][0]
            parts = {
                suffix: self._cast_part(part[:rows])
                for suffix, part in tensor.read_parts().items()
            }
            problem = _DAMAGED
        else:
            parts = pack_weight(packing, self.read(name))
            problem = (
                "has values too far apart to share a scale; leave out `bits`, or "
                "exclude it with `keep`"
            )
        parts |= self.learned.get(name, {})
        mx.eval(parts)
        if not unpacks_to_finite(packing, parts, self.dtype):
            raise OpenELMError(f"{name} {problem}.")
        return parts

    def read(self, name: str) -> mx.array:
        """Return a tensor (CoreNet name) unpacked in `dtype`. Raises as `parts`."""
        weight = self.read_whole(name)
        cast = weight.astype(self.dtype)
        mx.eval(cast)
        if not is_finite(cast):
            if is_finite(weight):
                raise OpenELMError(
                    f"{name} has values beyond {spell_dtype(self.dtype)}'s range; "
                    "choose `dtype` bfloat16."
                )
            raise OpenELMError(f"{name} {_DAMAGED}.")
        return cast

    def read_whole(self, name: str) -> mx.array:
        """Return a tensor in the source's precision, cut to the vocabulary."""
        weight = self.source.tensors[name].read()
        if name in (EMBEDDING, HEAD):
            weight = weight[: self.config.vocab_size]
        return weight

    def _cast_part(self, part: mx.array) -> mx.array:
        floating = mx.issubdtype(part.dtype, mx.floating)
        return part.astype(self.dtype) if floating else part
