"""Write a model as a GGUF file for llama.cpp, one tensor in memory at a time.

The `gguf` package defines llama.cpp's keys, tensor names and packing; this module maps
an OpenELM to them. As in llama.cpp's own converter, gate and up are two tensors,
one-dimensional tensors are always float32 and nothing is permuted.
"""

import contextlib
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from converters.formats.pt_writer import TensorToWrite, read_checked, to_numpy
from mlx_openelm.compatibility import describe_llama_cpp_limit
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError, package_of_extra
from mlx_openelm.tensor_names import to_module
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.text.tokenizer_json import describe

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE = "openelm"
_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
_LARGEST = {  # largest absolute value that fits
    "F32": 3.4028235e38,
    "F16": 65504.0,
    "BF16": 3.3895314e38,
    "Q8_0": 127 * 65504.0,  # a float16 scale for 32 numbers from -127 to 127
}


def write_gguf(
    path: Path,
    *,
    name: str,
    config: OpenELMConfig,
    tensors: Mapping[str, TensorToWrite],
    file_type: str,
    tokenizer: Tokenizer,
    chat_template: str | None = None,
    on_written: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a model and its tokenizer for llama.cpp.

    Args:
        name: display name of the model.
        tensors: by CoreNet name, exactly those of `config.tensor_shapes()`, finite.
        file_type: F32, F16, BF16 or Q8_0, for the tensors of two dimensions.
        chat_template: Jinja text.
        on_written: called with each tensor's CoreNet name once it is in the file.

    Raises:
        OpenELMError: llama.cpp cannot run the model, its values exceed the file type's
            range, or the package gguf is not installed.
        OSError: the file cannot be written.
    """
    gguf = import_gguf()
    shapes = config.tensor_shapes()
    _check_shapes(config, file_type)
    _check_tokenizer(tokenizer, config)
    parts = names_in_gguf(shapes, config.num_transformer_layers)
    with contextlib.closing(gguf.GGUFWriter(path, ARCHITECTURE)) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(as_utf8(name))
        _add_sizes(writer, config)
        _add_tokenizer(writer, tokenizer)
        if chat_template is not None:
            writer.add_chat_template(chat_template)
        kind = "ALL_F32" if file_type == "F32" else f"MOSTLY_{file_type}"
        writer.add_file_type(gguf.LlamaFileType[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for ours, shape in shapes.items():
            _add_header(writer, parts[ours], shape, _packing(shape, file_type))
        writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
        try:
            file = begin_data(writer)
        except (struct.error, OverflowError) as error:
            raise OpenELMError(
                f"A number of the model's config is too large for GGUF ({error}); "
                "correct its config.json."
            ) from error
        for ours, shape in shapes.items():
            array = read_checked(ours, tensors[ours])
            packing = _packing(shape, file_type)
            _check_range(array, ours, packing)
            for part in mx.split(array, len(parts[ours])):
                append_tensor(writer, file, _pack(part, packing))
            del array, part  # before the next one is read
            on_written(ours)


def import_gguf() -> Any:
    """Return the module gguf.

    Raises:
        OpenELMError: it is not installed.
    """
    with package_of_extra("gguf", "gguf", "Writing GGUF"):
        import gguf
    return gguf


def begin_data(writer: "GGUFWriter") -> IO[bytes]:
    """Write everything before the tensors' data; return the open file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    return file


def append_tensor(
    writer: "GGUFWriter", file: IO[bytes], array: np.ndarray[Any, np.dtype[Any]]
) -> None:
    """Write the data of the next tensor.

    Not write_tensor_data: its tofile may silently drop the last bytes on a full disk.
    """
    file.write(array.data)
    writer.write_padding(file, array.nbytes)


# Limits of llama.cpp -----------------------------------------------------------------


def _check_shapes(config: OpenELMConfig, file_type: str) -> None:
    if reason := describe_llama_cpp_limit(config):
        raise OpenELMError(
            f"llama.cpp's OpenELM does not support the model: {reason}; use `to` mlx "
            "or hf."
        )
    for name, shape in config.tensor_shapes().items():
        block, _ = _block(_packing(shape, file_type))
        if shape[-1] % block:
            raise OpenELMError(
                f"{name} has {shape[-1]} columns, but {file_type} needs a multiple of "
                f"{block}; use `dtype` bfloat16."
            )


def _check_tokenizer(tokenizer: Tokenizer, config: OpenELMConfig) -> None:
    if tokenizer.num_ids != config.vocab_size:
        # With padding, llama.cpp could sample rows that have no piece.
        raise OpenELMError(
            f"The tokenizer has {tokenizer.num_ids} pieces, but the embedding "
            f"{config.vocab_size} rows; llama.cpp needs one row per piece. Pass the "
            "`tokenizer` that the model was trained with."
        )
    try:
        describe(tokenizer)
    except OpenELMError as error:
        raise OpenELMError(
            f"llama.cpp tokenizes like a tokenizer.json, and {error}"
        ) from error


def _check_range(array: mx.array, name: str, packing: str) -> None:
    largest = mx.abs(array).max().astype(mx.float32)
    if largest > _LARGEST[packing]:
        raise OpenELMError(
            f"{name} holds the absolute value {largest.item():g}, beyond the range of "
            f"{packing}; use `dtype` bfloat16."
        )


# Metadata ----------------------------------------------------------------------------


def _add_sizes(writer: "GGUFWriter", config: OpenELMConfig) -> None:
    writer.add_block_count(config.num_transformer_layers)
    writer.add_context_length(config.max_context_length)
    writer.add_embedding_length(config.model_dim)
    writer.add_feed_forward_length(config.ffn_dims)
    writer.add_head_count(config.num_query_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_freq_constant)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: "GGUFWriter", tokenizer: Tokenizer) -> None:
    from gguf import TokenType

    processor, ids = tokenizer.processor, range(tokenizer.num_ids)

    def kind(i: int) -> TokenType:
        if i >= tokenizer.vocab_size:
            if not tokenizer.has(i):
                return TokenType.UNUSED
            silent = tokenizer.is_silent(i)
            return TokenType.CONTROL if silent else TokenType.USER_DEFINED
        if processor.IsUnknown(i):
            return TokenType.UNKNOWN
        if processor.IsControl(i):
            return TokenType.CONTROL
        return TokenType.BYTE if processor.IsByte(i) else TokenType.NORMAL

    writer.add_tokenizer_model("llama")  # llama.cpp's name for SentencePiece's BPE
    writer.add_tokenizer_pre("default")
    scores = [processor.GetScore(i) for i in range(tokenizer.vocab_size)]
    scores += [0.0] * (tokenizer.num_ids - tokenizer.vocab_size)
    # An unused id needs a text of its own, as in llama.cpp's converter.
    writer.add_token_list([tokenizer.piece(i) or f"[PAD{i}]" for i in ids])
    writer.add_token_scores(scores)
    writer.add_token_types([kind(i) for i in ids])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(processor.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)


def as_utf8(text: str) -> str:
    """Return a text that can be encoded; a file name may not be UTF-8."""
    return text.encode(errors="replace").decode()


# Tensors -----------------------------------------------------------------------------


def names_in_gguf(names: Iterable[str], num_layers: int) -> dict[str, list[str]]:
    """Return the GGUF names of each tensor's parts, by CoreNet name."""
    import gguf

    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.OPENELM, num_layers)
    split = {
        f"layers.{i}.ffn.proj_1.weight": [f"blk.{i}.ffn_gate", f"blk.{i}.ffn_up"]
        for i in range(num_layers)
    }
    return {
        name: [
            f"{part}.weight" for part in split.get(name) or [name_map[to_module(name)]]
        ]
        for name in names
    }


def _packing(shape: tuple[int, ...], file_type: str) -> str:
    return file_type if len(shape) == 2 else "F32"  # norms are always F32


def _block(packing: str) -> tuple[int, int]:
    """Return the numbers per block, and the bytes of a block."""
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[packing]]


def _add_header(
    writer: "GGUFWriter", parts: list[str], shape: tuple[int, ...], packing: str
) -> None:
    """Add a tensor to the header, which precedes the data of all tensors."""
    import gguf

    rows, *columns = shape
    block, size = _block(packing)
    for part in parts:
        shape_of_part = (rows // len(parts), *columns)
        writer.add_tensor_info(
            part,
            shape_of_part,
            np.dtype(np.float32),
            math.prod(shape_of_part) // block * size,
            raw_dtype=gguf.GGMLQuantizationType[packing],
        )


def _pack(array: mx.array, packing: str) -> np.ndarray[Any, np.dtype[Any]]:
    if packing in _DTYPES:
        return to_numpy(array.astype(_DTYPES[packing]))
    from gguf import quants

    full = to_numpy(array.astype(mx.float32))
    return quants.quantize(full, quants.GGMLQuantizationType[packing])
