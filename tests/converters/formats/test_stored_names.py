"""Names and dtypes of trainers: wrappers, buffers, float64, and what is unknown."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import call, expect_error, make_source
from models import UNEVEN, make_factors, weights_of, write_peft_folder
from safetensors.numpy import load_file, save_file

from converters.formats.adapter_reader import open_adapter
from converters.formats.sources import open_path
from converters.formats.tensor_readers import note_float64
from mlx_openelm.errors import OpenELMError
from mlx_openelm.tensor_names import map_to_corenet, note_buffers, to_corenet

NAMES = list(UNEVEN.tensor_shapes())
WRAPPERS = (
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)


def change(folder: Path, rename=lambda name: name, more=None) -> Path:
    path = folder / "model.safetensors"
    tensors = {rename(name): array for name, array in load_file(path).items()}
    save_file(tensors | (more or {}), path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_is_removed_at_every_place(wrapper):
    for name in NAMES:
        parts = name.split(".")
        for at in range(len(parts)):
            wrapped = ".".join((*parts[:at], wrapper, *parts[at:]))
            for stored in (wrapped, f"transformer.{wrapped}", f"model.{wrapped}"):
                assert to_corenet(stored) == name, stored


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.module.",
        "module._orig_mod.model.",
        "model.transformer.",
        "model._orig_mod.transformer._fsdp_wrapped_module.",
        "base_model.model.transformer.",
    ],
)
def test_any_order_of_wrappers_is_removed(prefix):
    assert map_to_corenet(prefix + name for name in NAMES).keys() == set(NAMES)


def test_names_of_other_architectures_stay():
    for name in ("h.0.norm.weight", "model.layer.1.norm.weight", "a.b.weight"):
        assert to_corenet(name) == name


def test_two_models_in_one_file_are_refused():
    names = [f"{part}.{name}" for part in ("student", "teacher") for name in NAMES]
    with pytest.raises(OpenELMError, match=r"student\.\S+ and teacher\.\S+ are both"):
        map_to_corenet(names)


def test_a_wrapped_folder_with_buffers_converts_with_a_note(tmp_path):
    folder = make_source(tmp_path / "folder")
    expected = load_file(folder / "model.safetensors")["transformer.norm.weight"]
    buffers = {
        "model._orig_mod.transformer.causal_mask": np.ones((2, 4, 4), bool),
        "transformer.layers.0.attn.pos_embedding.inv_freq": np.ones(4, np.float64),
        "n_averaged": np.array([3], np.int64),
    }
    change(folder, lambda name: f"model._orig_mod.{name}", buffers)
    source = open_path(folder)
    np.testing.assert_array_equal(source.tensors["norm.weight"].read(), expected)
    (note,) = source.notes
    assert note.startswith("Left out ")
    assert note.endswith(": buffers, which carry no weights.")
    assert "n_averaged" in note


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_float64_is_read_as_float32_with_a_note(tmp_path, suffix):
    folder = make_source(tmp_path / "folder")
    path = folder / "model.safetensors"
    wide = {name: w.astype(np.float64) for name, w in load_file(path).items()}
    path.unlink()
    if suffix == "safetensors":
        save_file(wide, path)
    else:
        torch = pytest.importorskip("torch")
        tensors = {name: torch.from_numpy(array) for name, array in wide.items()}
        path = folder / f"pytorch_model.{suffix}"
        torch.save(tensors, path)
    source = open_path(path if suffix == "pt" else folder)
    assert f"Read {len(wide)} tensors of float64 as float32." in source.notes
    read = source.tensors["norm.weight"].read()
    np.testing.assert_array_equal(
        read, wide["transformer.norm.weight"].astype(np.float32)
    )


@pytest.mark.parametrize("how", ["prefix", "inside", "adapter name", "float64"])
def test_a_peft_adapter_of_a_wrapped_model_is_the_same(tmp_path, how):
    modules = ("layers.0.attn.out_proj", "layers.2.ffn.proj_1")
    folder = write_peft_folder(
        tmp_path / "adapter", make_factors(weights_of(UNEVEN), modules)
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"^transformer.layers.0.attn.out_proj": 32}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(folder, tmp_path / "plain")
    plain = open_adapter(tmp_path / "plain")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    if how == "float64":
        changed = {name: array.astype(np.float64) for name, array in tensors.items()}
    else:
        new = {
            "prefix": ("base_model.", "_orig_mod.module.base_model."),
            "inside": ("transformer.", "_orig_mod.transformer.module."),
            "adapter name": (".weight", ".default.weight"),
        }[how]
        changed = {name.replace(*new, 1): array for name, array in tensors.items()}
    assert changed.keys() != tensors.keys() or how == "float64"
    save_file(changed, path)
    adapter = open_adapter(folder)
    assert any("float64" in note for note in adapter.notes) == (how == "float64")
    assert adapter.modules.keys() == plain.modules.keys() == set(modules)
    for name, module in adapter.modules.items():
        assert module.scale == plain.modules[name].scale
        for part, array in module.read().items():
            np.testing.assert_array_equal(array, plain.modules[name].read()[part])


def test_many_unknown_names_give_a_short_error(here):
    change(
        here / "source",
        lambda name: name.replace(".attn", ".wrapper.attn"),
        {f"value_head.layers_{i}.weight": np.ones(2, np.float32) for i in range(500)},
    )
    message = [
        "missing: layers.*.attn.qkv_proj.weight, layers.*.attn.q_norm.weight, ",
        "unexpected: layers.*.wrapper.attn.k_norm.weight, ",
        ", value_head.layers_0.weight, ",
        " and 495 more",
    ]
    error = expect_error(here, "convert", "source", message=message)
    assert len(error) < 1000
    error = expect_error(
        here, "generate", "Hi", "--model", "source", message=message[-1]
    )
    assert len(error) < 1000


def test_generate_names_convert_for_names_of_other_tools(here):
    change(here / "source", lambda name: f"_orig_mod.{name}")
    message = "`mlx-openelm convert source` makes a model folder of it"
    expect_error(here, "generate", "Hi", "--model", "source", message=message)
    assert call("convert", "source", "--mlx-path", "ours").exit_code == 0
    result = call("generate", "Hi", "--model", "ours", "-m", "2")
    assert result.exit_code == 0, result.stderr


def test_a_note_on_one_tensor_is_in_the_singular():
    assert note_float64(1) == ("Read 1 tensor of float64 as float32.",)
    (note,) = note_buffers(["layers.0.rotary.inv_freq", "layers.0.proj.weight"])
    assert note.endswith("inv_freq: a buffer, which carries no weights.")
