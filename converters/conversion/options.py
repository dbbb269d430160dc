"""What a person may ask of a conversion, checked before anything is read."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.quantization import EMBED_BITS, Quantization

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
FORMATS = ("mlx", "hf", "corenet", "peft", "gguf")
AUTO = "auto:"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is: `done` of `total` of these `units`."""

    done: int
    total: int
    units: str


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `convert`, as they are said; see there.

    Attributes:
        repack: pack merged tensors as the base has them, in its dtype (`fuse`).
    """

    to: str = "mlx"
    dtype: str | None = None
    bits: str | None = None
    group_size: int | None = None
    embed_bits: int | None = None
    mode: str = "affine"
    keep: str | None = None
    dequantize: bool = False
    calibration: str | None = None
    receipt: bool = True
    merge: bool = False
    apart: bool = False
    average: bool = False
    base: str | None = None
    tokenizer: str | None = None
    allow_overflow: bool = False
    repack: bool = False

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise OpenELMError(f"--to is {self.to}; it must be {', '.join(FORMATS)}.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise OpenELMError(
                f"--dtype is {self.dtype}; it must be {', '.join(DTYPES)}."
            )
        if self.quantizes and self.dequantize:
            raise OpenELMError("--dequantize and -q say the opposite; say one of them.")
        if self.quantizes and self.to in ("hf", "corenet", "peft"):
            raise OpenELMError(
                f"--to {self.to} holds unquantized weights; leave out -q, or write "
                "--to mlx or gguf."
            )
        if self.to == "gguf" and self.mode != "affine":
            raise OpenELMError("--to gguf has no --q-mode; --q-bits 8 makes it Q8_0.")
        if self.auto_bits is not None:
            self._quantization(None)  # its group size, embedding's bits and keep
        if self.auto_bits is not None and self.to != "mlx":
            raise OpenELMError("--q-bits auto is for --to mlx; say a number of bits.")
        if self.auto_bits is not None and self.mode != "affine":
            raise OpenELMError("--q-bits auto chooses affine bits; leave out --q-mode.")
        if self.merge and self.apart:
            raise OpenELMError(
                "--merge and --adapter-out say the opposite; say one of them."
            )
        if self.merge and self.to == "peft":
            raise OpenELMError(
                "--merge makes a model and --to peft writes an adapter; leave out one "
                "of them."
            )
        if self.apart and self.to not in ("mlx", "hf"):
            raise OpenELMError(
                f"--adapter-out goes with a model folder, not with --to {self.to}."
            )

    @property
    def auto_bits(self) -> float | None:
        """Bits a weight that --q-bits auto:X asks for."""
        if self.bits is None or not self.bits.startswith(AUTO):
            return None
        try:
            asked = float(self.bits.removeprefix(AUTO))
        except ValueError:
            asked = float("nan")
        if not 0 < asked < 32:
            raise OpenELMError(
                f"--q-bits is {self.bits}; say auto: and the bits per weight that the "
                "folder shall have, auto:4.5 for instance."
            )
        return asked

    @property
    def quantization(self) -> Quantization | None:
        """The uniform quantization that is asked for, if one is."""
        if self.bits is None and self.mode == "affine":
            return None
        if self.bits is not None and self.bits.startswith(AUTO):
            return None
        try:
            bits = None if self.bits is None else int(self.bits)
        except ValueError:
            raise OpenELMError(
                f"--q-bits is {self.bits}; say a number of bits, or auto:X."
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
        """Raise OpenELMError if --q-keep finds no module."""
        Quantization(keep=self.keep).check_keep(config)

    def idle(self) -> list[str]:
        """Return the options that do nothing, because nothing is packed for MLX."""
        said = {
            "--q-group-size": self.group_size,
            "--q-embed-bits": self.embed_bits,
            "--q-keep": self.keep,
            "--calibration": self.calibration,
        }
        packs = self.quantizes and self.to == "mlx"
        return [] if packs else [name for name in said if said[name] is not None]

    def said(self) -> Mapping[str, Any]:
        """Return what differs from the defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }
