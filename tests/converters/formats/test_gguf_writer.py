"""GGUF files, read with gguf, MLX and (if installed) llama.cpp."""

import errno
import functools
import io
import resource
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
from models import TEXT, UNEVEN, small_tokenizer, weights_of

from converters.formats.gguf_writer import write_gguf
from converters.formats.pt_writer import TensorToWrite
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.tensor_names import EMBEDDING
from mlx_openelm.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

FILE_TYPES = ("F32", "F16", "BF16", "Q8_0")
WEIGHTS = weights_of(UNEVEN)


def to_write(arrays: Mapping[str, mx.array]) -> dict[str, TensorToWrite]:
    return {
        name: TensorToWrite(
            array.shape, array.dtype, functools.partial(arrays.get, name)
        )
        for name, array in arrays.items()
    }


def write(
    path: Path,
    file_type: str = "F32",
    *,
    config: OpenELMConfig = UNEVEN,
    changes: Mapping[str, np.ndarray] | None = None,
    dtype: mx.Dtype = mx.float32,
    tokenizer: Tokenizer | None = None,
    name: str = "Uneven",
) -> Path:
    weights = (WEIGHTS if config == UNEVEN else weights_of(config)) | dict(
        changes or {}
    )
    write_gguf(
        path,
        name=name,
        config=config,
        tensors=to_write({n: mx.array(w).astype(dtype) for n, w in weights.items()}),
        file_type=file_type,
        tokenizer=tokenizer or small_tokenizer(),
    )
    return path


def in_gguf(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors by llama.cpp's names, with gate and up separated."""
    renamed = {
        "token_embd.weight": weights["token_embeddings.weight"],
        "output_norm.weight": weights["norm.weight"],
    }
    for i, F in enumerate(UNEVEN.ffn_dims):
        ours, theirs = f"layers.{i}", f"blk.{i}"
        renamed |= {
            f"{theirs}.attn_norm.weight": weights[f"{ours}.attn_norm.weight"],
            f"{theirs}.attn_qkv.weight": weights[f"{ours}.attn.qkv_proj.weight"],
            f"{theirs}.attn_q_norm.weight": weights[f"{ours}.attn.q_norm.weight"],
            f"{theirs}.attn_k_norm.weight": weights[f"{ours}.attn.k_norm.weight"],
            f"{theirs}.attn_output.weight": weights[f"{ours}.attn.out_proj.weight"],
            f"{theirs}.ffn_norm.weight": weights[f"{ours}.ffn_norm.weight"],
            f"{theirs}.ffn_gate.weight": weights[f"{ours}.ffn.proj_1.weight"][:F],
            f"{theirs}.ffn_up.weight": weights[f"{ours}.ffn.proj_1.weight"][F:],
            f"{theirs}.ffn_down.weight": weights[f"{ours}.ffn.proj_2.weight"],
        }
    return renamed


def read_metadata(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


# Tensors -----------------------------------------------------------------------------


def test_the_tensor_names_are_llama_cpps(tmp_path):
    names = {tensor.name for tensor in gguf.GGUFReader(write(tmp_path / "x")).tensors}
    listed = [
        gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.OPENELM]
    ]
    layers = range(UNEVEN.num_transformer_layers)
    assert names == {f"{n.format(bid=i)}.weight" for n in listed for i in layers}
    assert names == in_gguf(WEIGHTS).keys()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_ggufs_reader_reads_every_number(tmp_path, file_type, dtype):
    path = write(tmp_path / "model.gguf", file_type, dtype=dtype)
    source = {
        name: np.array(mx.array(w).astype(dtype).astype(mx.float32))
        for name, w in WEIGHTS.items()
    }
    expected = in_gguf(source)
    for tensor in gguf.GGUFReader(path).tensors:
        weight = expected.pop(tensor.name)
        kind = gguf.GGMLQuantizationType[file_type if weight.ndim == 2 else "F32"]
        assert tensor.tensor_type == kind
        assert tuple(tensor.shape) == weight.shape[::-1]
        packed = gguf.quants.quantize(weight, kind)
        assert tensor.data.tobytes() == packed.tobytes(), tensor.name
    assert not expected


def test_q8_0_is_within_half_a_step(tmp_path):
    for tensor in gguf.GGUFReader(write(tmp_path / "x", "Q8_0")).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            weight = in_gguf(WEIGHTS)[tensor.name]
            unpacked = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            blocks = weight.reshape(-1, 32)
            step = abs(blocks).max(1, keepdims=True) / 127
            error = abs(unpacked.reshape(-1, 32) - blocks)
            assert (error <= 0.57 * step).all()  # the step itself is rounded too
            assert (error > 0.4 * step).any()


@pytest.mark.parametrize("file_type", ["F32", "F16"])
def test_mlx_reads_the_same_tensors(tmp_path, file_type):
    loaded = mx.load(str(write(tmp_path / "model.gguf", file_type)))
    expected = in_gguf(WEIGHTS)
    assert loaded.keys() == expected.keys()
    for name, weight in expected.items():
        dtype = np.float16 if file_type == "F16" and weight.ndim == 2 else np.float32
        np.testing.assert_array_equal(np.array(loaded[name]), weight.astype(dtype))


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    config = replace(UNEVEN, model_dim=4096)  # the largest tensor has 5 MB
    shapes, events = config.tensor_shapes(), []

    def reader(name: str) -> TensorToWrite:
        def read() -> mx.array:
            events.append(f"read {name}")
            return mx.ones(shapes[name])

        return TensorToWrite(shapes[name], mx.float32, read)

    before = mx.get_active_memory()
    mx.reset_peak_memory()
    write_gguf(
        tmp_path / "x.gguf",
        name="",
        config=config,
        tensors={name: reader(name) for name in shapes},
        file_type="F16",
        tokenizer=small_tokenizer(),
        on_written=lambda name: events.append(f"wrote {name}"),
    )
    assert events == [
        f"{action} {name}" for name in shapes for action in ("read", "wrote")
    ]
    largest = 4 * max(int(np.prod(shape)) for shape in shapes.values())
    assert mx.get_peak_memory() - before < 2.5 * largest


@pytest.mark.parametrize("missing", [1, 100, 5000])
def test_a_disk_that_fills_up_is_always_an_error(tmp_path, missing):
    size = write(tmp_path / "whole.gguf").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - missing, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write(tmp_path / "cut.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG


# Metadata and tokenizer --------------------------------------------------------------


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_the_metadata_follow_from_the_config(tmp_path, file_type):
    config = replace(UNEVEN, rope_freq_constant=5e5, rms_norm_eps=0.5)
    metadata = read_metadata(write(tmp_path / "x", file_type, config=config))
    expected = {
        "general.architecture": "openelm",
        "general.type": "model",
        "general.name": "Uneven",
        "general.size_label": "120K",
        "general.file_type": {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}[file_type],
        "general.quantization_version": 2,
        "openelm.block_count": 3,
        "openelm.context_length": 64,
        "openelm.embedding_length": 64,
        "openelm.feed_forward_length": [96, 160, 64],
        "openelm.attention.head_count": [2, 4, 6],
        "openelm.attention.head_count_kv": [1, 4, 2],
        "openelm.attention.key_length": 16,
        "openelm.attention.value_length": 16,
        "openelm.attention.layer_norm_rms_epsilon": 0.5,
        "openelm.rope.dimension_count": 16,
        "openelm.rope.freq_base": 5e5,
    }
    assert {key: metadata.get(key) for key in expected} == expected
    others = metadata.keys() - expected.keys()
    assert {key.split(".")[0] for key in others} == {"GGUF", "tokenizer"}


def test_the_metadata_hold_the_tokenizer(tmp_path):
    tokenizer = small_tokenizer()
    processor = tokenizer.processor
    metadata = read_metadata(write(tmp_path / "x"))
    ours = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}
    assert ours["model"] == "llama"
    assert ours["pre"] == "default"
    assert ours["tokens"] == [processor.IdToPiece(i) for i in range(300)]
    assert ours["scores"] == [processor.GetScore(i) for i in range(300)]
    assert ours["token_type"] == [2, 3, 3, *[6] * 256, *[1] * 41]
    for i in range(3, 259):
        assert ours["tokens"][i] == f"<0x{i - 3:02X}>"
    assert [ours[f"{x}_token_id"] for x in ("unknown", "bos", "eos")] == [0, 1, 2]
    assert ours["add_bos_token"] is ours["add_space_prefix"] is True
    assert ours["add_eos_token"] is False


def test_a_name_that_is_not_utf8_is_replaced(tmp_path):
    metadata = read_metadata(write(tmp_path / "x", name="caf\udce9 日本"))
    assert metadata["general.name"] == "caf? 日本"


# Refusals ----------------------------------------------------------------------------


def expect_error(path: Path, message: str, *args: Any, **options: Any) -> None:
    with pytest.raises(OpenELMError) as caught:
        write(path, *args, **options)
    assert message in str(caught.value)
    assert str(caught.value).endswith(".")


def test_unsupported_models_are_refused_before_writing(tmp_path):
    path = tmp_path / "x.gguf"
    expect_error(
        path, "untied output", config=replace(UNEVEN, share_input_output_layers=False)
    )
    expect_error(
        path,
        "300 pieces, but the embedding 384",
        config=replace(UNEVEN, vocab_size=384),
    )
    expect_error(path, "which is not BPE", tokenizer=unigram_tokenizer())
    odd = replace(UNEVEN, ffn_dims=(96, 100, 64))
    expect_error(
        path, "layers.1.ffn.proj_2.weight has 100 columns, but Q8_0", "Q8_0", config=odd
    )
    assert not path.exists()
    write(path, "F16", config=odd)


def unigram_tokenizer() -> Tokenizer:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_writer=written,
        model_type="unigram",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
    )
    return Tokenizer(written.getvalue())


@pytest.mark.parametrize(
    ("file_type", "fits", "overflows"),
    [("F16", 65504, 65520), ("Q8_0", 8.3e6, 8.4e6), ("BF16", 3.38e38, 3.4e38)],
)
def test_a_number_beyond_the_range_is_refused_with_its_tensor(
    tmp_path, file_type, fits, overflows
):
    name = "layers.1.ffn.proj_2.weight"
    for sign in (1, -1):
        changed = WEIGHTS[name].copy()
        changed[-1, -1] = sign * fits
        write(tmp_path / "x", file_type, changes={name: changed})
        changed[-1, -1] = sign * overflows
        message = f"{name} holds the absolute value {overflows:g}, beyond"
        expect_error(tmp_path / "x", message, file_type, changes={name: changed})
    norm = np.full(64, 1e6, np.float32)  # norms are float32 in every file
    write(tmp_path / "x", file_type, changes={"norm.weight": norm})


def test_a_bfloat16_number_beyond_float16_is_refused(tmp_path):
    changed = WEIGHTS[EMBEDDING].copy()
    changed[3, 3] = 65536  # what 65504 is rounded to in bfloat16
    changes = {EMBEDDING: changed}
    expect_error(tmp_path / "x", EMBEDDING, "F16", dtype=mx.bfloat16, changes=changes)


def test_config_values_beyond_ggufs_range_are_refused(tmp_path):
    odd = replace(UNEVEN, rope_freq_constant=1e300)
    expect_error(tmp_path / "x", "too large for GGUF", config=odd)


def test_a_missing_gguf_package_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    expect_error(tmp_path / "x", "pip install 'mlx-openelm[gguf]'")
