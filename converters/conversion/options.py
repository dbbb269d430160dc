"""Options of a conversion, checked before anything is read."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.quantization import EMBED_BITS, MODES, Quantization
from mlx_openelm.options import MODEL_PANEL, check_options, option

AUTO = "auto:"
QUANTIZATION = "Quantization"  # a heading in --help


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a conversion: `done` of `total`, counted in `units`."""

    done: int
    total: int
    units: str


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """What `convert` writes.

    Attributes:
        apart: write the adapter that the source carries to its own folder.
        base: the base model of a source that is an adapter.
        repack: quantize merged tensors as in the base, in its dtype (`fuse`).
    """

    to: str = option(
        "mlx",
        "Format to write: a model folder (mlx, hf) or one file (corenet, gguf); of an "
        "adapter: mlx, peft or corenet.",
        choices=("mlx", "hf", "corenet", "peft", "gguf"),
    )
    dtype: str | None = option(
        None,
        "Data type of the weights.",
        panel=MODEL_PANEL,
        shown_default="as stored; for {to} mlx, float32 becomes bfloat16",
        choices=("float32", "float16", "bfloat16"),
    )
    allow_overflow: bool = option(
        False,
        "Allow {dtype} float16 for the 3B, whose activations overflow in it.",
        panel=MODEL_PANEL,
    )
    bits: int | str | None = option(
        None,
        "Bits of the linear layers; auto:4.5 chooses them for each tensor, 4.5 bits a "
        "weight on average.",
        flags=("--q-bits",),
        panel=QUANTIZATION,
        shown_default="4, or those of {mode}",
        read=str,
    )
    group_size: int | None = option(
        None,
        "Number of weights that share a scale.",
        flags=("--q-group-size",),
        panel=QUANTIZATION,
        shown_default="64, or that of {mode}",
    )
    mode: str = option(
        "affine",
        "Number format of quantized weights.",
        flags=("--q-mode",),
        panel=QUANTIZATION,
        choices=MODES,
    )
    embed_bits: int | None = option(
        None,
        "Bits of the embedding.",
        flags=("--q-embed-bits",),
        panel=QUANTIZATION,
        shown_default=f"{EMBED_BITS}; chosen if {{bits}} is auto",
    )
    keep: str | None = option(
        None,
        "Regular expression; modules whose name matches it are not quantized.",
        flags=("--q-keep",),
        panel=QUANTIZATION,
    )
    dequantize: bool = option(
        False, "Unpack quantized weights to 16 bits.", panel=QUANTIZATION
    )
    calibration: str | Path | None = option(
        None,
        "Text file on which the quantization error is measured.",
        panel=QUANTIZATION,
        shown_default="a built-in sample",
        read=os.path.expanduser,
    )
    receipt: bool = option(
        True, "Do not measure the quantization error.", panel=QUANTIZATION
    )
    merge: bool = option(
        False, "Merge the adapter of the source into the weights.", panel=MODEL_PANEL
    )
    apart: bool = False
    average: bool = option(
        False, "Average the weights of several .pt files.", panel=MODEL_PANEL
    )
    base: str | None = None
    tokenizer: str | None = option(
        None,
        "Tokenizer to write into the folder: a file, a folder, a Hub id, or none.",
        panel=MODEL_PANEL,
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
        """Average bits per weight of `bits` "auto:N"; None for any other value."""
        if not str(self.bits).startswith(AUTO):
            return None
        try:
            bits = float(str(self.bits).removeprefix(AUTO))
        except ValueError:
            bits = float("nan")
        if not 0 < bits < 32:
            raise OpenELMError(
                f"`bits` is {self.bits}; give auto: and the average bits per weight, "
                "auto:4.5 for example."
            )
        return bits

    @property
    def quantization(self) -> Quantization | None:
        """The uniform quantization; None for auto bits or no quantization."""
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
    def nominal_bits(self) -> float | None:
        """Bits of the linear layers, or on average; None without quantization."""
        uniform = self.quantization
        return self.auto_bits if uniform is None else uniform.linear.bits

    @property
    def suffix(self) -> str:
        """Suffix of the default output name, for example "-4bit"."""
        if self.mode != "affine":
            return f"-{self.mode}"
        return "" if self.nominal_bits is None else f"-{self.nominal_bits:g}bit"

    def keeps(self, name: str) -> bool:
        """Whether a tensor (CoreNet name) is not quantized, because of `keep`."""
        return Quantization(keep=self.keep).keeps(name)

    def check_keep(self, config: OpenELMConfig) -> None:
        """Raise OpenELMError if `keep` matches no module."""
        Quantization(keep=self.keep).check_keep(config)

    def idle(self) -> list[str]:
        """Return the options without effect, because nothing is quantized for MLX."""
        if self.quantizes and self.to == "mlx":
            return []
        names = ("group_size", "embed_bits", "keep", "calibration")
        return [f"`{name}`" for name in names if getattr(self, name) is not None]

    def changed(self) -> Mapping[str, Any]:
        """Return the options that differ from their defaults, as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        texts = {name: str(values[name]) for name in ("bits", "calibration")}
        return {
            field.name: texts.get(field.name, values[field.name])
            for field in fields(self)
            if values[field.name] != field.default
        }
