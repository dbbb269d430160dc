"""Options of a conversion, checked before anything is read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from converters.quantization.learning_amount import LearningAmount
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.quantization import (
    AFFINE_BITS,
    EMBED_BITS,
    MODES,
    Packing,
    Quantization,
)
from mlx_openelm.options import MODEL_PANEL, check_options, option

AUTO = "auto:"
_BITS = f"{', '.join(map(str, AFFINE_BITS[:-1]))} or {AFFINE_BITS[-1]}"
QUANTIZATION = "Quantization"  # a heading in --help
UNLEARNABLE = {  # modes whose scales are not real numbers
    "mxfp4": "they are powers of two",
    "mxfp8": "they are powers of two",
    "nvfp4": "they are numbers of 8 bits",
}


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a conversion: `done` of `total`, in `units`."""

    done: int
    total: int
    units: str


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """Options of `convert`.

    Attributes:
        apart: write the adapter that the source contains to its own folder.
        base: the base model of an adapter source.
        repack: quantize merged tensors as in the base, in its dtype (used by `fuse`).
    """

    to: str = option(
        "mlx",
        "Format to write: a model folder (mlx, hf) or one file (corenet, gguf); of an "
        "adapter: mlx, peft, corenet or gguf.",
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
        f"Bits of the linear layers: {_BITS}; auto:X chooses them for each tensor, X "
        "bits a weight on average (auto:4.5).",
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
        f"Bits per weight of the embedding: {_BITS}.",
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
    learn: str | None = option(
        None,
        "Train scales and biases after rounding: minutes (10), or steps (200steps).",
        panel=QUANTIZATION,
    )
    teacher_bits: int | None = option(
        None,
        "Keep the model that {learn} learns from in memory with so many bits per "
        "weight: less memory.",
        panel=QUANTIZATION,
        shown_default="16",
    )
    teacher_cache: str | Path | None = option(
        None,
        "Folder in which the outputs of the model that {learn} learns from are kept, "
        "so that it is not in memory meanwhile.",
        panel=QUANTIZATION,
    )
    seed: int = option(
        0, "Seed of {learn}.", panel=QUANTIZATION, least=0, most=2**31 - 1
    )
    calibration: str | Path | None = option(
        None,
        "Text file on which the quantization error is measured; {learn} learns from "
        "another part of it.",
        panel=QUANTIZATION,
        shown_default="a built-in sample",
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
    weights: str | None = option(
        None,
        "Weights to read from a .pt or .bin of a training run: model, or ema (their "
        "moving average).",
        panel=MODEL_PANEL,
        shown_default="model, or what the file has",
        choices=("model", "ema"),
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
            raise OpenELMError("Use either `dequantize` or quantization, not both.")
        if self.quantizes and self.to in ("hf", "corenet", "peft"):
            raise OpenELMError(
                f"`to` {self.to} does not support quantized weights; leave out the "
                "quantization, or use `to` mlx or gguf."
            )
        if self.to == "gguf" and self.mode != "affine":
            raise OpenELMError(
                f"`to` gguf does not support `mode` {self.mode}; use `bits` 8 for Q8_0."
            )
        if self.auto_bits is not None:
            self._quantization(None)  # checks group size, embed_bits and keep
        if self.auto_bits is not None and self.to != "mlx":
            raise OpenELMError("`bits` auto requires `to` mlx; give a number of bits.")
        if self.auto_bits is not None and self.mode != "affine":
            raise OpenELMError("`bits` auto requires `mode` affine; leave out `mode`.")
        self._check_learning()
        if self.merge and self.apart:
            raise OpenELMError("Use either `merge` or `adapter_out`, not both.")
        if self.merge and self.to == "peft":
            raise OpenELMError(
                "Use either `merge`, which writes a model, or `to` peft, which writes "
                "an adapter."
            )
        if self.apart and self.to not in ("mlx", "hf"):
            raise OpenELMError(f"`adapter_out` requires `to` mlx or hf, not {self.to}.")

    def _check_learning(self) -> None:
        if self.learn is None:
            for name in ("teacher_bits", "teacher_cache", "seed"):
                if getattr(self, name) not in (None, 0):
                    raise OpenELMError(f"`{name}` requires `learn`.")
            return
        if self.teacher_cache == "":
            raise OpenELMError("`teacher_cache` is empty; pass a folder.")
        _ = self.learning_amount
        if reason := UNLEARNABLE.get(self.mode):
            raise OpenELMError(
                f"`learn` cannot train the scales of `mode` {self.mode}: {reason}; "
                "leave out `mode`."
            )
        if not (self.quantizes or self.repack):
            raise OpenELMError("`learn` trains a quantization; add `bits`.")
        if self.to != "mlx":
            raise OpenELMError(f"`learn` requires `to` mlx, not {self.to}.")
        if self.teacher_bits not in (None, *AFFINE_BITS):
            raise OpenELMError(
                f"`teacher_bits` is {self.teacher_bits}; MLX has "
                f"{', '.join(map(str, AFFINE_BITS))}."
            )

    @property
    def learning_amount(self) -> LearningAmount | None:
        """How long scales are trained; None: not at all."""
        return None if self.learn is None else LearningAmount.parse(str(self.learn))

    @property
    def auto_bits(self) -> float | None:
        """N of `bits` "auto:N": bits per weight on average; None for other values."""
        if not str(self.bits).startswith(AUTO):
            return None
        try:
            average = float(str(self.bits).removeprefix(AUTO))
        except ValueError:
            average = float("nan")
        if not 0 < average < 32:
            raise OpenELMError(
                f"`bits` is {self.bits}; expected auto:N, where N is the average bits "
                "per weight (between 0 and 32), for example auto:4.5."
            )
        return average

    @property
    def quantization(self) -> Quantization | None:
        """The uniform quantization of these options; None if there is none."""
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
    def requested_bits(self) -> float | None:
        """Bits per weight: of the linears, or the average of "auto:N"."""
        uniform = self.quantization
        return self.auto_bits if uniform is None else uniform.linear.bits

    @property
    def suffix(self) -> str:
        """Suffix of the default output name, such as "-4bit"."""
        if self.mode != "affine":
            return f"-{self.mode}"
        return "" if self.requested_bits is None else f"-{self.requested_bits:g}bit"

    def keeps(self, name: str) -> bool:
        """Whether `keep` excludes a tensor (CoreNet name) from quantization."""
        return Quantization(keep=self.keep).keeps(name)

    def check_keep(self, config: OpenELMConfig) -> None:
        """Raise OpenELMError if `keep` matches no module."""
        Quantization(keep=self.keep).check_keep(config)

    def check_learned_modes(self, packings: Iterable[Packing]) -> None:
        """Raise OpenELMError if tensors keep a mode of the source without `learn`."""
        for mode in {packing.mode for packing in packings} & UNLEARNABLE.keys():
            advice = "add `bits`" if self.keep is None else "leave out `keep`"
            raise OpenELMError(
                f"`learn` cannot train the scales of {mode}, in which tensors of the "
                f"source stay: {UNLEARNABLE[mode]}; {advice}."
            )

    def ignored(self) -> list[str]:
        """Return the given options without effect, as nothing is quantized for MLX."""
        if self.quantizes and self.to == "mlx":
            return []
        names = ("group_size", "embed_bits", "keep", "calibration")
        return [f"`{name}`" for name in names if getattr(self, name) is not None]

    def changed(self) -> Mapping[str, Any]:
        """Return the options that differ from their defaults, as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        paths = ("calibration", "teacher_cache")
        texts = {name: str(values[name]) for name in ("bits", *paths)}
        return {
            field.name: texts.get(field.name, values[field.name])
            for field in fields(self)
            if values[field.name] != field.default
        }
