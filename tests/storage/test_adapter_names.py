"""Adapters as other tools name their tensors, and folders that also hold a model."""

import mlx.core as mx
import numpy as np
import pytest
from commands import call, make_source
from models import (
    UNEVEN,
    make_factors,
    weights_of,
    write_mlx_lm_adapter,
    write_peft_folder,
)
from safetensors.numpy import load_file, save_file

from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.adapter_folder import find_weights
from mlx_openelm.storage.loading import load

FACTORS = make_factors(weights_of(UNEVEN), ("layers.0.attn.qkv_proj",))
TOKENS = mx.array([[1, 5, 9, 200, 7]])


@pytest.fixture(name="base")
def _base(tmp_path):
    return make_source(tmp_path / "base")


def change(folder, rename=lambda name: name, more=None):
    path = folder / "adapters.safetensors"
    tensors = {rename(name): array for name, array in load_file(path).items()}
    save_file(tensors | (more or {}), path, metadata={"format": "mlx"})


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"model.{name}",
        lambda name: name.removeprefix("transformer."),
        lambda name: name.replace("attn.", "attn._fsdp_wrapped_module."),
    ],
    ids=["compiled", "prefix", "none", "inside"],
)
def test_names_of_other_tools_are_attached(tmp_path, base, rename):
    folder = write_mlx_lm_adapter(tmp_path / "adapter", FACTORS)
    expected = load(str(base), folder)[0](TOKENS)
    change(folder, rename)
    assert mx.array_equal(load(str(base), folder)[0](TOKENS), expected)


def test_buffers_of_an_adapter_are_left_out_with_a_note(tmp_path, base):
    folder = write_mlx_lm_adapter(tmp_path / "adapter", FACTORS)
    expected = load(str(base), folder)[0](TOKENS)
    name = "transformer.layers.0.attn.rope.inv_freq"
    more = {name: np.ones(3, np.float32), "step": np.array([3], np.int64)}
    change(folder, more=more)
    with pytest.warns(UserWarning, match=f"Left out step, {name}: buffers"):
        model, _ = load(str(base), folder)
    assert mx.array_equal(model(TOKENS), expected)


def test_an_adapter_beside_a_model_is_fused(base):
    write_peft_folder(base, FACTORS)
    error = call("generate", "Hi", "--adapter-path", base).stderr
    assert "is a PEFT adapter; `mlx-openelm fuse --adapter-path" in error
    assert "base-fused` merges it into its base" in error
    error = call("convert", base, "--merge").stderr
    assert "a model beside its adapter" in error
    assert "`mlx-openelm fuse --adapter-path" in error
    fused = base.with_name("base-fused")
    options = ("--adapter-path", base, "--model", base, "--save-path", fused)
    result = call("fuse", *options)
    assert result.exit_code == 0, result.stderr


def test_only_a_run_is_waited_for(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(OpenELMError, match=r"the copy is incomplete; copy it again\.$"):
        find_weights(tmp_path)
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    with pytest.raises(OpenELMError, match=r"not saved yet, .*; wait until it has"):
        find_weights(tmp_path)
