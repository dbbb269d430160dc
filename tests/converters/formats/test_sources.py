"""Sources that are not an OpenELM are refused with all their problems."""

import json
import os
import pickle
import shutil
import struct
import time
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from commands import expect_error, make_source
from models import UNEVEN, make_factors, weights_of, write_mlx_lm_adapter, write_pt
from pickles import mapping, tensor, zipped

from mlx_openelm.storage.weight_files import INDEX

WEIGHTS = weights_of(UNEVEN)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.pt", None, "no.pt does not exist"),
        ("nowhere", None, "There is no folder nowhere"),
        ("~nobody/x", None, "There is no folder ~nobody/x"),
        ("x" * 3000, None, "name too long"),
        ("~\0", None, "There is no folder ~"),
        ("empty.pt", b"", "empty.pt is not a file of torch.save: it is empty"),
        ("text.pt", b"To be or not to be", "text.pt is not a file of torch.save"),
        ("source/model.safetensors", None, "one file of a model folder"),
    ],
)
def test_a_source_that_is_not_a_model_is_refused(here, name, content, message):
    if content is not None:
        (here / name).write_bytes(content)
    expect_error(here, "convert", name, "--mlx-path", "a/b", message=message)


@pytest.mark.parametrize("base", ["~\0", "~\ud800", "a\nb", "x" * 5000])
def test_an_adapter_with_an_invalid_base_name_is_refused(here, base):
    factors = make_factors(WEIGHTS, ("layers.0.attn.out_proj",))
    config = write_mlx_lm_adapter(here / "adapter", factors) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model": base}))
    message = ["The base that adapter names", "pass another with --model BASE"]
    expect_error(here, "convert", "adapter", "--merge", "--offline", message=message)


def test_a_checkpoint_with_very_many_tensors_is_refused_quickly(here):
    names = [f"layers.{i}.attn_norm.weight" for i in range(20_000)]
    one = tensor(shape=(6,), strides=(1,))
    content = mapping(
        **{"token_embeddings.weight": tensor()} | dict.fromkeys(names, one)
    )
    (here / "many.pt").write_bytes(zipped(content))
    started = time.perf_counter()
    missing = "lacks layers.0.attn.qkv_proj"
    message = expect_error(here, "convert", "many.pt", message=missing)
    assert time.perf_counter() - started < 60  # a hang would take minutes
    assert len(message) < 10_000


def test_code_in_a_pickle_is_not_run(here):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    with zipfile.ZipFile("evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"a": Evil()}, protocol=2))
    expect_error(here, "convert", "evil.pt", message=["would call", "posix.mkdir"])


def test_a_truncated_or_foreign_checkpoint_is_refused(here):
    pytest.importorskip("torch", reason="needs PyTorch to write .pt files")
    whole = write_pt(here / "cut.pt", WEIGHTS).read_bytes()
    for length in (100, len(whole) // 2, len(whole) - 1):
        (here / "cut.pt").write_bytes(whole[:length])
        expect_error(here, "convert", "cut.pt", message="cut.pt")
    llama = dict.fromkeys(["model.norm.weight", "lm_head.bias"], np.ones(9, "f"))
    write_pt(here / "llama.pt", llama)
    expect_error(
        here,
        "convert",
        "llama.pt",
        message=["not an OpenELM", "lm_head.bias, norm.weight"],
    )
    cut = {name: w for name, w in WEIGHTS.items() if name != "norm.weight"}
    write_pt(here / "cut.pt", {**cut, "layers.0.attn_norm.weight": np.ones(63, "f")})
    message = ["missing: norm.weight", "attn_norm.weight is [63], expected [64]"]
    expect_error(here, "convert", "cut.pt", message=message)


@pytest.mark.parametrize("command", ["convert", "inspect"])
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"", "model.safetensors is damaged"),
        ("model.safetensors", -1, "model.safetensors is damaged"),
        ("model.safetensors", 1000, "model.safetensors is damaged"),
        ("model.safetensors", b"\xff" * 99, "model.safetensors is damaged"),
        ("config.json", b"", "config.json cannot be parsed"),
        ("config.json", 100, "config.json cannot be parsed"),
        ("config.json", b"[" * 9999, "config.json cannot be parsed"),
        ("config.json", b"\xff\xfe", "Cannot read"),
        ("config.json", b"[1, 2]", "config.json holds a list"),
        ("config.json", b"{}", "not an OpenELM's"),
    ],
)
def test_damaged_files_of_a_folder_are_reported(here, command, file, content, message):
    path = here / "source" / file
    if isinstance(content, int):
        content = path.read_bytes()[:content]
    path.write_bytes(content)
    expect_error(here, command, "source", message=message)


@pytest.mark.parametrize("command", ["convert", "inspect"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "index.json cannot be parsed"),
        (b'{"weight_map": [1]}', "has no weight_map"),
        (b'{"weight_map": {"a": "b"}}', "b of its index is missing"),
        (b'{"weight_map": {}}', "no weight_map, or an empty one"),
        (b'{"weight_map": {"a": "../b\\n\\u0000"}}', r"../b\n\x00 of its index"),
    ],
)
def test_a_damaged_index_of_shards_is_reported(here, command, content, message):
    whole = here / "source" / "model.safetensors"
    whole.rename(whole.with_name("model-00001-of-00001.safetensors"))
    (here / "source" / INDEX).write_bytes(content)
    expect_error(here, command, "source", message=message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "llama", "llama"),
        ("head_dim", None, "head_dim = None"),
        ("model_dim", "64", "model_dim = '64'"),
        ("model_dim", 128, "token_embeddings.weight is [300, 64], expected [300, 128]"),
        ("vocab_size", 10, "is [300, 64], expected [10, 64]"),
        ("ffn_dims", [96, 160], "ffn_dims"),
        ("ffn_dims", [96, 160, 32], "layers.2.ffn.proj_2.weight is [64, 64], expected"),
        ("ffn_dim_divisor", 0, "cannot be read"),
        ("num_transformer_layers", 10**9, "1000000000 layers"),
        ("rope_freq_constant", float("nan"), "rope_freq_constant is nan"),
        ("max_context_length", 64.5, "max_context_length is 64.5"),
        pytest.param("max_context_length", 9 * 10**4299, "below 2**31", id="digits"),
        ("share_input_output_layers", False, "missing: lm_head.weight"),
        ("share_input_output_layers", "no", "share_input_output_layers is 'no'"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(here, key, value, message):
    path = here / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    expect_error(here, "convert", "source", message=message)
    expect_error(here, "inspect", "source", message=message)


def test_all_tensors_that_do_not_fit_are_reported_with_both_shapes(here):
    changes = {
        "layers.0.attn.q_norm.weight": None,
        "layers.2.ffn_norm.weight": None,
        "norm.weight": np.ones(63, "f"),
        "layers.1.ffn.proj_2.weight": np.ones((64, 4), "f"),
        "layers.1.bias": np.ones(3, "f"),
    }
    make_source(here / "odd", changes)
    message = [
        "missing: layers.0.attn.q_norm.weight, layers.2.ffn_norm.weight;",
        "unexpected: layers.1.bias;",
        "norm.weight is [63], expected [64]",
        "layers.1.ffn.proj_2.weight is [64, 4], expected [64, 160]",
    ]
    expect_error(here, "convert", "odd", message=message)


def test_duplicate_tensors_and_wrong_dtypes_are_reported(here):
    path = here / "source" / "model.safetensors"
    shutil.copy(path, path.with_name("model-00001-of-00002.safetensors"))
    path.rename(path.with_name("model-00002-of-00002.safetensors"))
    expect_error(
        here, "convert", "source", message=["model-00001-of-00002", "remove one"]
    )
    path.with_name("model-00001-of-00002.safetensors").unlink()
    path.with_name("model-00002-of-00002.safetensors").rename(path)
    content = path.read_bytes()
    arrays = mx.load(str(path)) | {"module.norm.weight": mx.ones(64)}
    mx.save_safetensors(str(path), arrays)
    message = ["module.norm.weight", "are both norm.weight"]
    expect_error(here, "convert", "source", message=message)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["transformer.norm.weight"] |= {"dtype": "I64", "shape": [32]}
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + content[8 + length :])
    expect_error(here, "convert", "source", message="norm.weight is stored as I64")


def test_the_folder_of_a_training_run_is_refused_with_its_checkpoints(here):
    run = here / "run"
    run.mkdir()
    (run / "checkpoint_average.pt").touch()
    (run / "config.json").write_text(json.dumps(UNEVEN.to_dict()))
    message = "for example with `mlx-openelm convert run/checkpoint_average.pt`"
    expect_error(here, "convert", "run", message=message)
