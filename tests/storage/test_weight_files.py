"""Which weights a folder means that holds more than one set of them."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from commands import call, make_source
from models import UNEVEN, make_factors, weights_of, write_peft_folder

from converters.formats.adapter_reader import open_adapter
from converters.formats.sources import open_path
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.hub import choose_model_files
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.storage.weight_files import INDEX, find_weight_files

NAME = "transformer.norm.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SINGLE = "model.safetensors"


def add_stale_shards(folder: Path) -> None:
    """Add shards of zeros and their index to a folder with a single file."""
    arrays = mx.load(str(folder / SINGLE))
    names, weight_map = sorted(arrays), {}
    for shard, part in zip(SHARDS, (names[:9], names[9:]), strict=True):
        zeros = {name: mx.zeros_like(arrays[name]) for name in part}
        mx.save_safetensors(str(folder / shard), zeros, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def first_norm(folder: Path) -> float:
    read = open_folder(folder).read()[NAME][0].item()
    converted = open_path(folder).tensors["norm.weight"].read()[0].item()
    assert read == converted
    return read


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    return make_source(tmp_path / "folder")


def test_the_single_file_comes_before_stale_shards(folder):
    before = first_norm(folder)
    assert before
    assert find_weight_files(folder).notes == ()
    add_stale_shards(folder)
    assert first_norm(folder) == before
    for note in (*open_folder(folder).notes, *open_path(folder).notes):
        assert f"using {SINGLE}, not {SHARDS[0]}, {SHARDS[1]}, {INDEX}" in note


def test_a_stale_index_without_its_shards_is_not_an_incomplete_folder(folder):
    before = first_norm(folder)
    add_stale_shards(folder)
    for shard in SHARDS:
        (folder / shard).unlink()
    assert first_norm(folder) == before
    (folder / INDEX).write_text("{")
    assert first_norm(folder) == before


def test_shards_without_a_single_file_need_their_index(folder):
    add_stale_shards(folder)
    (folder / SINGLE).unlink()
    assert first_norm(folder) == 0
    shutil.copy(folder / SHARDS[0], folder / "model-00001-of-00001.safetensors")
    assert first_norm(folder) == 0  # the index names the others
    assert "not model-00001-of-00001.safetensors" in open_folder(folder).notes[0]
    (folder / SHARDS[1]).unlink()
    with pytest.raises(OpenELMError, match=f"is incomplete: {SHARDS[1]} of its index"):
        open_folder(folder)


def test_verify_names_files_that_only_mlx_lm_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_source(tmp_path / "source")
    assert call("convert", "source", "--mlx-path", "made").exit_code == 0
    whole = (tmp_path / "made" / INDEX).read_bytes()
    add_stale_shards(tmp_path / "made")
    result = call("verify", "made")
    assert result.exit_code == 1
    assert f"{SHARDS[0]} is not used, but mlx-lm loads it: remove it" in result.stdout
    for shard in SHARDS:
        (tmp_path / "made" / shard).unlink()
    assert call("verify", "made").exit_code == 0  # mlx-lm does not read the index
    (tmp_path / "made" / INDEX).write_bytes(whole)
    assert call("verify", "made").stderr == ""
    (tmp_path / "made" / INDEX).write_text("{")
    assert "cannot be parsed" in call("verify", "made").stdout


def test_bin_files_follow_the_same_rule(folder):
    torch = pytest.importorskip("torch")
    arrays = mx.load(str(folder / SINGLE))
    tensors = {n: torch.from_numpy(np.array(array)) for n, array in arrays.items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    torch.save(zeros, folder / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": dict.fromkeys(zeros, "pytorch_model-00001-of-00001.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save(tensors, folder / "pytorch_model.bin")
    source = open_path(folder)  # safetensors come first, as in transformers
    assert [file.name for file in source.files] == [SINGLE]
    assert "not pytorch_model-00001-of-00001.bin, pytorch_model.bin" in source.notes[0]
    (folder / SINGLE).unlink()
    source = open_path(folder)
    assert [file.name for file in source.files] == ["pytorch_model.bin"]
    assert source.tensors["norm.weight"].read()[0].item() != 0
    assert "using pytorch_model.bin, not pytorch_model-" in source.notes[0]


def test_both_files_of_a_peft_adapter_are_named(tmp_path):
    modules = ("layers.0.attn.out_proj",)
    folder = write_peft_folder(
        tmp_path / "adapter", make_factors(weights_of(UNEVEN), modules)
    )
    assert open_adapter(folder).notes == ()
    (folder / "adapter_model.bin").write_bytes(b"another adapter")
    (note,) = open_adapter(folder).notes
    assert "using adapter_model.safetensors, not adapter_model.bin" in note


def test_an_adapter_with_its_bases_config_is_an_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = make_source(tmp_path / "source")
    factors = make_factors(weights_of(UNEVEN), ("layers.0.attn.out_proj",))
    folder = write_peft_folder(tmp_path / "adapter", factors)
    shutil.copy(source / "config.json", folder)
    result = call("convert", "adapter", "--mlx-path", "made")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "made" / "adapters.safetensors").is_file()
    shutil.copy(source / SINGLE, folder)  # now it is a model, and message so
    result = call("convert", "adapter", "--mlx-path", "model")
    assert f"using {SINGLE}, not adapter_model.safetensors" in result.stderr


def test_the_hub_downloads_what_is_used():
    names = ["config.json", SINGLE, *SHARDS, INDEX, "pytorch_model.bin"]
    assert choose_model_files(names) == ["config.json", SINGLE]
    names.remove(SINGLE)
    assert choose_model_files(names) == ["config.json", INDEX, *SHARDS]


def test_a_link_to_a_missing_file_is_named(folder):
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("../blobs/0123")
    with pytest.raises(OpenELMError, match=r"is a link to a missing file, \.\./blobs"):
        open_folder(folder)
