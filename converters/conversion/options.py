"""What a person may ask of a conversion, checked before anything is read."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.quantization import EMBED_BITS, MODES, Quantization
from mlx_openelm.options import check_options, option

AUTO = "auto:"
QUANTIZATION = "Quantization"  # a heading in --help


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is: `done` of `total` of these `units`."""

    done: int
    total: int
    units: str


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """What `convert` shall write.

    Attributes:
        apart: the adapter that the source carries is written to a folder of its own.
        base: the base model of a source that is an adapter.
        repack: pack merged tensors as the base has them, in its dtype (`fuse`).
    """

    to: str = option(
        "mlx",
        "Form to write: a model folder (mlx, hf), one file (corenet, gguf), or of an "
        "adapter peft or corenet.",
        choices=("mlx", "hf", "corenet", "peft", "gguf"),
    )
    dtype: str | None = option(
        None,
        "Type of the weights.",
        shown_default="as stored, and for {to} mlx float32 becomes bfloat16",
        choices=("float32", "float16", "bfloat16"),
    )
    allow_overflow: bool = option(
        False, "Write float16 even for the 3B, whose activations overflow in it."
    )
    bits: int | str | None = option(
        None,
        "Bits of the linear layers; auto:N chooses bits for each tensor, N on average.",
        flags=("--q-bits",),
        panel=QUANTIZATION,
        shown_default="4, or what {mode} has",
        read=str,
    )
    group_size: int | None = option(
        None,
        "Weights that share a scale.",
        flags=("--q-group-size",),
        panel=QUANTIZATION,
        shown_default="64, or what {mode} has",
    )
    mode: str = option(
        "affine",
        "How numbers are stored.",
        flags=("--q-mode",),
        panel=QUANTIZATION,
        choices=MODES,
    )
    embed_bits: int | None = option(
        None,
        "Bits of the embedding.",
        flags=("--q-embed-bits",),
        panel=QUANTIZATION,
        shown_default=f"{EMBED_BITS}; chosen, where {{bits}} is auto",
    )
    keep: str | None = option(
        None,
        "Do not quantize modules whose name contains this regular expression.",
        flags=("--q-keep",),
        panel=QUANTIZATION,
    )
    dequantize: bool = option(
        False, "Write quantized weights in 16 bits.", panel=QUANTIZATION
    )
    calibration: str | Path | None = option(
        None,
        "Text on which the error of quantization is measured.",
        panel=QUANTIZATION,
        shown_default="a built-in sample",
        read=os.path.expanduser,
    )
    receipt: bool = option(
        True, "Do not measure the error of quantization.", panel=QUANTIZATION
    )
    merge: bool = option(False, "Merge the adapter of the source into the weights.")
    apart: bool = False
    average: bool = option(False, "Average several .pt files.")
    base: str | None = None
    tokenizer: str | None = option(
        None,
        "Tokenizer to store: a file, a folder, a Hub id, or none.",
        shown_default="the source's",
    )
    repack: bool = False

    def __post_init__(self) -> None:
        check_options(self)
        if self.quantizes and self.dequantize:
            raise OpenELMError("`dequantize` and `bits` exclude each other; give one.")
        if self.quantizes and self.to in ("hf", "corenet", "peft"):
            raise OpenELMError(
                f"`to` {self.to} holds unquantized weights; leave out `bits`, or write "
                "`to` mlx or gguf."
            )
        if self.to == "gguf" and self.mode != "affine":
            raise OpenELMError("`to` gguf has no `mode`; `bits` 8 makes it Q8_0.")
        if self.auto_bits is not None:
            self._quantization(None)  # its group size, embedding's bits and keep
        if self.auto_bits is not None and self.to != "mlx":
            raise OpenELMError("`bits` auto is for `to` mlx; give a number of bits.")
        if self.auto_bits is not None and self.mode != "affine":
            raise OpenELMError("`bits` auto chooses affine bits; leave out `mode`.")
        if self.merge and self.apart:
            raise OpenELMError(
                "`merge` and `adapter_out` exclude each other; give one."
            )
        if self.merge and self.to == "peft":
            raise OpenELMError(
                "`merge` makes a model and `to` peft writes an adapter; leave out one "
                "of them."
            )
        if self.apart and self.to not in ("mlx", "hf"):
            raise OpenELMError(
                f"`adapter_out` goes with a model folder, not with `to` {self.to}."
            )

    @property
    def auto_bits(self) -> float | None:
        """Bits a weight that `bits` "auto:N" asks for."""
        if not str(self.bits).startswith(AUTO):
            return None
        try:
            asked = float(str(self.bits).removeprefix(AUTO))
        except ValueError:
            asked = float("nan")
        if not 0 < asked < 32:
            raise OpenELMError(
                f"`bits` is {self.bits}; give auto: and the bits per weight that the "
                "folder shall have, auto:4.5 for example."
            )
        return asked

    @property
    def quantization(self) -> Quantization | None:
        """The uniform quantization that is asked for, if one is."""
        if self.bits is None and self.mode == "affine":
            return None
        if str(self.bits).startswith(AUTO):
            return None
        try:
            bits = None if self.bits is None else int(self.bits)
        except ValueError:
            raise OpenELMError(
                f"`bits` is {self.bits}; give a number of bits, or auto:N."
            ) from None
        return self._quantization(bits)

    def _quantization(self, bits: int | None) -> Quantization:
        embed_bits = EMBED_BITS if self.embed_bits is None else self.embed_bits
        return Quantization(bits, self.group_size, embed_bits, self.mode, self.keep)

    @property
    def quantizes(self) -> bool:
        return self.quantization is not None or self.auto_bits is not None

    @property
    def asked_bits(self) -> float | None:
        """Bits that were asked for: of the linears, or on average."""
        asked = self.quantization
        return self.auto_bits if asked is None else asked.linear.bits

    @property
    def suffix(self) -> str:
        """What the name of the result says of its bits: "-4bit", say."""
        if self.mode != "affine":
            return f"-{self.mode}"
        return "" if self.asked_bits is None else f"-{self.asked_bits:g}bit"

    def keeps(self, name: str) -> bool:
        """Whether a tensor (CoreNet name) is left as it is."""
        return Quantization(keep=self.keep).keeps(name)

    def check_keep(self, config: OpenELMConfig) -> None:
        """Raise OpenELMError if `keep` matches no module."""
        Quantization(keep=self.keep).check_keep(config)

    def idle(self) -> list[str]:
        """Return the options that do nothing, because nothing is packed for MLX."""
        if self.quantizes and self.to == "mlx":
            return []
        names = ("group_size", "embed_bits", "keep", "calibration")
        return [f"`{name}`" for name in names if getattr(self, name) is not None]

    def changed(self) -> Mapping[str, Any]:
        """Return the options that differ from their defaults, as JSON has them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        texts = {name: str(values[name]) for name in ("bits", "calibration")}
        return {
            field.name: texts.get(field.name, values[field.name])
            for field in fields(self)
            if values[field.name] != field.default
        }
