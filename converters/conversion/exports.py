"""Single-file exports: CoreNet's .pt and GGUF."""

import itertools
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from converters.conversion.options import Progress
from converters.conversion.plan import ConversionPlan
from converters.formats.adapter_reader import Adapter, with_rows
from converters.formats.adapter_writer import corenet_adapter_tensors
from converters.formats.gguf_writer import write_gguf
from converters.formats.pt_writer import TensorToWrite
from mlx_openelm.config import OpenELMConfig, pad_vocabulary
from mlx_openelm.errors import OpenELMError
from mlx_openelm.tensor_names import EMBEDDING, HEAD
from mlx_openelm.text.chat_templates import chat_template
from mlx_openelm.text.tokenizer import Tokenizer

CLASSIFIER = "classifier.weight"  # CoreNet's name of an untied head
GGUF_TYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}
FILE_SUFFIXES = {"corenet": ".pt", "gguf": ".gguf"}  # of formats that are one file


def refuse_other_suffix(target: Path, to: str) -> None:
    """Raise OpenELMError if a file of this format does not end in its suffix."""
    suffix = FILE_SUFFIXES.get(to)
    if suffix and target.suffix != suffix:
        raise OpenELMError(
            f"`to` {to} writes a {suffix} file, but {target} does not end in that; "
            "choose another `mlx_path`."
        )


def corenet_tensors(
    plan: ConversionPlan, adapter: Adapter | None = None
) -> tuple[dict[str, TensorToWrite], tuple[str, ...]]:
    """Return the tensors of a CoreNet checkpoint, and notes for the user.

    CoreNet adds a padding row to the vocabulary and rounds it up to a multiple of 128;
    rows that the source lacks are zeros.

    Args:
        adapter: fits the plan's model, except for padding; it is not merged.
    """
    rows = plan.config.vocab_size
    padded = rows if plan.source.padded else pad_vocabulary(rows)
    tensors = {}
    for name, shape in plan.config.tensor_shapes().items():
        if name in (EMBEDDING, HEAD):
            stored_name = CLASSIFIER if name == HEAD else name
            tensors[stored_name] = TensorToWrite(
                (padded, *shape[1:]), plan.dtype, _padding_reader(plan, name, padded)
            )
        else:
            tensors[name] = TensorToWrite(shape, plan.dtype, _reader(plan, name))
    notes = []
    if padded != rows:
        notes.append(
            f"Padded the embedding with {padded - rows} rows of zeros to {padded}, "
            "CoreNet's vocabulary size."
        )
    if plan.config.to_dict() != _as_inferred(plan.config).to_dict():
        notes.append(
            "A .pt holds only tensors: keep the source's config.json beside it for the "
            "context length, RoPE base and eps."
        )
    if adapter is not None:
        fitted = with_rows(adapter, padded)
        tensors, adapter_notes = corenet_adapter_tensors(fitted, tensors)
        notes += adapter_notes
    return tensors, tuple(notes)


def write_gguf_file(
    path: Path,
    plan: ConversionPlan,
    tokenizer: Tokenizer,
    *,
    template: str | None,
    bits: float | None,
    on_written: Callable[[str], None],
) -> None:
    """Write a GGUF file: Q8_0 if `bits` is 8, else the plan's dtype.

    Raises:
        OpenELMError: GGUF or llama.cpp's OpenELM does not support this model.
    """
    if bits not in (None, 8):
        raise OpenELMError(
            f"`to` gguf supports only 8 bits (Q8_0), not {bits}; use `bits` 8, or "
            "leave out the quantization and quantize the file with llama.cpp."
        )
    write_gguf(
        path,
        name=plan.source.name,
        config=plan.config,
        tensors={
            name: TensorToWrite(shape, plan.dtype, _reader(plan, name))
            for name, shape in plan.config.tensor_shapes().items()
        },
        file_type="Q8_0" if bits else GGUF_TYPES[plan.dtype],
        tokenizer=tokenizer,
        chat_template=chat_template(template),
        on_written=on_written,
    )


def count_tensors(
    on_progress: Callable[[Progress], None], total: int
) -> Callable[[str], None]:
    """Return a callback that reports progress after each written tensor."""
    numbers = itertools.count(1)
    return lambda name: on_progress(Progress(next(numbers), total, "tensors"))


def _as_inferred(config: OpenELMConfig) -> OpenELMConfig:
    """Return the config that a reader of the .pt infers from its shapes."""
    return OpenELMConfig.from_shapes(config.tensor_shapes())


def _reader(plan: ConversionPlan, name: str) -> Callable[[], mx.array]:
    return lambda: plan.read(name)


def _padding_reader(
    plan: ConversionPlan, name: str, rows: int
) -> Callable[[], mx.array]:
    def read() -> mx.array:
        weight = plan.read(name)
        return mx.pad(weight, [(0, rows - weight.shape[0]), (0, 0)])

    return read
