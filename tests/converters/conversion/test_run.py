"""Conversion of sources to model folders: values, dtypes, quantization, metadata."""

import hashlib
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    EVEN,
    UNEVEN,
    build,
    read_golden,
    small_tokenizer,
    weights_of,
    write_hugging_face,
    write_pt,
)

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from converters.conversion.run import convert
from mlx_openelm.bench.selfcheck import made_weight
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.packed_weights import pack_weight, unpack_weight
from mlx_openelm.model.quantization import Packing, Quantization
from mlx_openelm.storage.loading import load, load_model
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.tensor_names import to_folder

pytest.importorskip("torch", reason="needs PyTorch to write .pt files")


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(small_tokenizer().model_proto)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_pt(tmp_path_factory.mktemp("source") / "even.pt", weights_of(EVEN))


def golden_difference(case, tmp_path):
    metadata, shapes, tokens, positions, logits = read_golden(case)
    seed = int(metadata["seed"])
    source = write_pt(
        tmp_path / f"{case}.pt", {n: made_weight(n, s, seed) for n, s in shapes.items()}
    )
    report = convert(source, tmp_path / "out", dtype="float32", tokenizer="none")
    source.unlink()
    folder = open_folder(report.path)
    assert folder.config.vocab_size == 32000
    actual = np.array(load_model(folder)(mx.array(tokens)))[:, positions]
    logits = logits[..., :32000]
    assert (actual.argmax(-1) == logits.argmax(-1)).all()
    return np.abs(actual - logits).max()


@pytest.mark.parametrize(
    "case", ["gpt-test", pytest.param("OpenELM-270M", marks=pytest.mark.proof)]
)
def test_a_converted_model_reproduces_apples_logits(case, tmp_path):
    assert golden_difference(case, tmp_path) <= 1e-4


@pytest.mark.parametrize("wrap", [None, "model_state_dict", "ema_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_flat_and_wrapped_checkpoints_are_read(tmp_path, wrap, prefix, tokenizer_file):
    weights = weights_of(EVEN)
    named = {prefix + name: w for name, w in weights.items()}
    source = write_pt(tmp_path / "checkpoint.pt", named, wrap)
    report = convert(
        source, tmp_path / "out", dtype="float32", tokenizer=tokenizer_file
    )
    read = open_folder(report.path).read()
    assert read.keys() == {to_folder(name) for name in weights}
    for name, weight in weights.items():
        assert np.array_equal(np.array(read[to_folder(name)]), weight), name


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["pt", "folder"])
def test_weights_are_cast_to_the_dtype(tmp_path, stored, dtype, kind, tokenizer_file):
    import torch

    weights = {
        n: torch.from_numpy(w).to(getattr(torch, stored))
        for n, w in weights_of(EVEN).items()
    }
    if kind == "pt":
        source = tmp_path / "checkpoint.pt"
        torch.save(weights, source)
    else:
        from safetensors.torch import save_file

        source = tmp_path / "folder"
        write_hugging_face(source, EVEN, {})
        named = {to_folder(n): w for n, w in weights.items()}
        save_file(named, source / "model.safetensors", metadata={"format": "pt"})
    report = convert(source, tmp_path / "out", dtype=dtype, tokenizer=tokenizer_file)
    expected = dtype or ("bfloat16" if stored == "float32" else stored)
    assert report.dtype == expected
    written = open_folder(report.path)
    assert written.raw["torch_dtype"] == expected
    read = written.read()
    for name, weight in weights.items():
        array = read[to_folder(name)]
        assert str(array.dtype) == f"mlx.core.{expected}"
        cast = weight.to(getattr(torch, expected)).float().numpy()
        assert np.array_equal(np.array(array.astype(mx.float32)), cast), name


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantized_folders_hold_what_mlx_quantizes_to(
    tmp_path, bits, checkpoint, tokenizer_file
):
    report = convert(
        checkpoint,
        tmp_path / "out",
        dtype="float32",
        bits=bits,
        group_size=32,
        embed_bits=6,
        receipt=False,
        tokenizer=tokenizer_file,
    )
    folder = open_folder(report.path)
    assert folder.raw["quantization"] == folder.raw["quantization_config"]
    read = folder.read()
    for name, weight in weights_of(EVEN).items():
        if weight.ndim == 1:
            assert name not in folder.packings
            continue
        expected = Packing(6 if "embeddings" in name else bits, 32)
        assert folder.packings[name] == expected
        packed = pack_weight(expected, mx.array(weight))
        module = to_folder(name).removesuffix(".weight")
        for suffix, part in packed.items():
            assert mx.array_equal(read[f"{module}.{suffix}"], part)
    assert report.bits_per_weight == pytest.approx(
        8 * sum(a.nbytes for a in read.values()) / EVEN.num_parameters
    )
    tokens = mx.array([[1, 5, 9]])
    unpacked = build(EVEN)
    for name, packing in folder.packings.items():
        parts = pack_weight(packing, mx.array(weights_of(EVEN)[name]))
        weight = unpack_weight(packing, parts, mx.float32)
        unpacked.load_weights([(to_folder(name), weight)], strict=False)
    logits = load_model(folder)(tokens)
    assert mx.allclose(logits, unpacked(tokens), atol=1e-4)
    assert not mx.allclose(logits, build(EVEN)(tokens), atol=1e-2)


def test_the_embedding_has_eight_bits_by_default(tmp_path, checkpoint, tokenizer_file):
    report = convert(
        checkpoint, tmp_path / "out", bits=4, receipt=False, tokenizer=tokenizer_file
    )
    entry = json.loads((report.path / "config.json").read_text())["quantization"]
    assert (entry["bits"], entry["group_size"]) == (4, 64)
    assert entry["transformer.token_embeddings"]["bits"] == 8


def test_a_padded_embedding_is_cut_to_the_tokenizers_pieces(tmp_path, tokenizer_file):
    padded = replace(EVEN, vocab_size=384)  # 300 pieces and a pad, in steps of 128
    weights = weights_of(padded)
    source = write_pt(tmp_path / "padded.pt", weights)
    report = convert(
        source, tmp_path / "out", dtype="float32", tokenizer=tokenizer_file
    )
    folder = open_folder(report.path)
    assert folder.config.vocab_size == 300
    table = folder.read()["transformer.token_embeddings.weight"]
    assert np.array_equal(np.array(table), weights["token_embeddings.weight"][:300])
    assert any("384" in note and "300" in note for note in report.notes)


def test_untied_models_and_copies_of_a_tied_head(tmp_path, tokenizer_file):
    untied = replace(EVEN, share_input_output_layers=False)
    weights = weights_of(untied)
    source = write_hugging_face(tmp_path / "untied", untied, weights)
    report = convert(
        source, tmp_path / "out", dtype="float32", tokenizer=tokenizer_file
    )
    assert not open_folder(report.path).config.share_input_output_layers

    copied = {
        **weights_of(EVEN),
        "lm_head.weight": weights_of(EVEN)["token_embeddings.weight"],
    }
    source = write_hugging_face(tmp_path / "copied", EVEN, copied)
    report = convert(source, tmp_path / "out2", tokenizer=tokenizer_file)
    assert "lm_head.weight" not in open_folder(report.path).tensors
    other = {**copied, "lm_head.weight": weights["lm_head.weight"]}
    source = write_hugging_face(tmp_path / "other", EVEN, other)
    with pytest.raises(OpenELMError, match=r"lm_head\.weight differs"):
        convert(source, tmp_path / "out3", tokenizer=tokenizer_file)


def test_the_provenance_is_stored(tmp_path, checkpoint, tokenizer_file):
    report = convert(checkpoint, tmp_path / "out", tokenizer=tokenizer_file)
    metadata = json.loads((report.path / "config.json").read_text())["mlx_openelm"]
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert metadata["source"]["files"] == {"even.pt": f"sha256:{digest}"}
    assert metadata["source"]["kind"] == "CoreNet checkpoint"
    assert (report.path / "README.md").read_text().startswith("---\nlibrary_name: mlx")


def test_a_config_next_to_the_checkpoint_is_used_and_must_fit(tmp_path, tokenizer_file):
    source = write_pt(tmp_path / "even.pt", weights_of(EVEN))
    bare = convert(source, tmp_path / "bare", tokenizer=tokenizer_file)
    assert open_folder(bare.path).config.max_context_length == 2048
    assert any("2048" in note for note in bare.notes)
    (tmp_path / "config.json").write_text(json.dumps(EVEN.to_dict()))
    configured = convert(source, tmp_path / "configured", tokenizer=tokenizer_file)
    assert open_folder(configured.path).config == EVEN
    other = replace(EVEN, ffn_dims=(64, 128, 128))
    (tmp_path / "config.json").write_text(json.dumps(other.to_dict()))
    with pytest.raises(OpenELMError, match=r"layers\.2\.ffn\.proj_1.*expected"):
        convert(source, tmp_path / "wrong", tokenizer=tokenizer_file)
    assert not (tmp_path / "wrong").exists()


def test_converting_a_folder_again_changes_nothing(
    tmp_path, checkpoint, tokenizer_file
):
    first = convert(checkpoint, tmp_path / "a", tokenizer=tokenizer_file)
    second = convert(first.path, tmp_path / "b")  # uses its tokenizer
    one, two = open_folder(first.path), open_folder(second.path)
    assert one.config == two.config
    read = two.read()
    assert all(mx.array_equal(array, read[name]) for name, array in one.read().items())
    model, tokenizer = load(str(second.path))
    assert tokenizer.encode("a king") == small_tokenizer().encode("a king")
    assert model(mx.array([[1, 2]])).shape == (1, 2, 300)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from([32, 64, 128]),
    st.integers(0, 1000),
)
def test_packing_loses_less_than_a_step(bits, group_size, seed):
    rng = np.random.default_rng(seed)
    weight = mx.array(rng.standard_normal((8, 256), dtype=np.float32))
    packing = Packing(bits, group_size)
    back = unpack_weight(packing, pack_weight(packing, weight), mx.float32)
    groups = weight.reshape(8, -1, group_size)
    step = (groups.max(-1) - groups.min(-1)) / (2**bits - 1)
    error = mx.abs(back - weight).reshape(8, -1, group_size).max(-1)
    assert bool((error <= 1.01 * step + 1e-6).all())


def test_a_group_size_that_does_not_divide_names_the_tensors():
    with pytest.raises(OpenELMError, match=r"layers\.0\.ffn\.proj_2\.weight \(96\)"):
        Quantization(4, 64).packings(UNEVEN)
    with pytest.raises(OpenELMError, match="`bits` is 7"):
        Quantization(7)


def test_the_released_sizes_divide_by_every_group_size():
    for size in ("270M", "450M", "1.1B", "3B"):
        for group_size in (32, 64, 128):
            assert Quantization(4, group_size).packings(OpenELMConfig.preset(size))
