"""Adapters that mlx-lm made, on our model."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from models import build, small_tokenizer, weights_of, write_hugging_face
from test_conversion import EVEN

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from mlx_openelm.errors import OpenELMError
from mlx_openelm.loading import load
from mlx_openelm.tokenizer_finder import write_tokenizer

TOKENS = mx.array([[1, 5, 9, 200, 7]])


@pytest.fixture
def base(tmp_path):
    folder = write_hugging_face(tmp_path / "base", EVEN, weights_of(EVEN))
    write_tokenizer(small_tokenizer(), folder)
    return folder


def make_adapter(folder, base, kind, keys=None):
    """Let mlx-lm's own layers make an adapter with no zero in it; return its logits."""
    from mlx_lm import load as load_theirs
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = load_theirs(str(base))
    parameters = {"rank": 4, "scale": 2.5, "dropout": 0.0}
    if keys:
        parameters["keys"] = keys
    model.freeze()
    linear_to_lora_layers(model, 3, parameters, use_dora=kind == "dora")
    rng = np.random.default_rng(1)
    tensors = {
        name: array + mx.array(0.1 * rng.standard_normal(array.shape, dtype=np.float32))
        for name, array in tree_flatten(model.trainable_parameters())
    }
    model.load_weights(list(tensors.items()), strict=False)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    config = {"fine_tune_type": kind, "num_layers": 3, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return np.array(model(TOKENS))


@pytest.mark.interop
@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("lora", None),
        ("dora", None),
        ("lora", ["attn.qkv_proj"]),
        ("dora", ["attn.qkv_proj"]),
        ("lora", ["transformer.token_embeddings", "ffn.proj_2"]),
    ],
)
def test_an_adapter_of_mlx_lms_gives_mlx_lms_logits(tmp_path, base, kind, keys):
    expected = make_adapter(tmp_path / "adapter", base, kind, keys)
    model, _ = load(str(base), adapter_path=tmp_path / "adapter")
    found = np.array(model(TOKENS))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - np.array(build(EVEN)(TOKENS))).max() > 0.1


@pytest.mark.interop
def test_an_adapter_of_another_model_is_refused_with_its_shapes(tmp_path, base):
    make_adapter(tmp_path / "adapter", base, "lora")
    path = tmp_path / "adapter" / "adapters.safetensors"
    tensors = dict(mx.load(str(path)))
    name = "transformer.layers.0.attn.out_proj.lora_a"
    tensors[name] = mx.zeros((7, 4))
    tensors["transformer.layers.9.attn.out_proj.lora_a"] = mx.zeros((64, 4))
    mx.save_safetensors(str(path), tensors)
    with pytest.raises(OpenELMError, match=r"unexpected: .*layers\.9.*\[7, 4\]"):
        load(str(base), adapter_path=tmp_path / "adapter")


def test_a_full_fine_tune_replaces_the_weights(tmp_path, base):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights = weights_of(EVEN, seed=5)
    named = {f"transformer.{name}": mx.array(w) for name, w in weights.items()}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), named)
    (adapter / "adapter_config.json").write_text('{"fine_tune_type": "full"}')
    model, _ = load(str(base), adapter_path=adapter)
    assert mx.allclose(model(TOKENS), build(EVEN, seed=5)(TOKENS), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no adapter_config.json"),
        ('{"fine_tune_type": "ia3", "lora_parameters": {"scale": 1}}', "ia3"),
        ('{"fine_tune_type": "lora"}', r"lora_parameters\.scale"),
    ],
)
def test_a_folder_that_is_no_adapter_is_refused(tmp_path, base, config, message):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {"x": mx.zeros((2,))})
    if config:
        (adapter / "adapter_config.json").write_text(config)
    with pytest.raises(OpenELMError, match=message):
        load(str(base), adapter_path=adapter)
