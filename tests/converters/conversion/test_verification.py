"""`verify`: damaged headers, checks that cannot be made, advice on problems."""

import json
import shutil

import pytest
from commands import call, make_source
from safetensors.numpy import load_file, save_file

from converters.conversion.run import convert
from mlx_openelm.storage.shards import write_json
from mlx_openelm.storage.weight_files import INDEX


@pytest.fixture(name="made")
def _made(tmp_path):
    make_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "made")
    return tmp_path / "made"


def verify(folder, *words) -> str:
    """Run; expect that it fails with all `words` in its error, which is returned."""
    result = call("verify", folder)
    assert result.exit_code == 1, result.stdout
    for word in words:
        assert word in result.stderr
    return result.stderr


def test_a_damaged_header_does_not_hide_damaged_weights(made):
    path = made / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    content[content.index(b'"mlx"') + 1] ^= 1
    path.write_bytes(content)
    verify(made, "model.safetensors has changed since it was converted")


def test_a_check_that_was_not_made_is_not_listed(made):
    assert "hashes" in call("verify", made).stdout
    config = json.loads((made / "config.json").read_text())
    entry = config.pop("mlx_openelm")
    write_json(made / "config.json", config)
    names = [
        c["name"] for c in json.loads(call("verify", made, "--json").stdout)["checks"]
    ]
    assert names == ["index and shapes", "weights are numbers", "tokenizer"]
    config["mlx_openelm"] = entry
    config["mlx_openelm"]["options"]["tokenizer"] = "none"
    config["mlx_openelm"].pop("files")
    write_json(made / "config.json", config)
    for path in made.glob("tokenizer*"):
        path.unlink()
    result = call("verify", made)
    assert result.exit_code == 0
    assert "tokenizer" not in result.stdout
    assert "hashes" not in result.stdout


def test_weights_of_another_tool_are_not_compared(made):
    shutil.rmtree(made)
    convert(made.with_name("source"), made, dtype="float32")
    path = made / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "mlx"})  # sorts by name
    result = call("verify", made)
    assert result.exit_code == 0, result.stderr
    assert "hashes" not in result.stdout
    assert "were not compared" in result.stderr


GENERIC = "; convert or download it again."


def test_a_problem_has_one_advice(made):
    tokenizer = made / "tokenizer.model"
    content = tokenizer.read_bytes()
    tokenizer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid 1\n")
    error = verify(made, "run git lfs pull")
    assert GENERIC not in error
    tokenizer.write_bytes(content)
    extra = shutil.copy(made / "model.safetensors", made / "model-old.safetensors")
    error = verify(made, "model-old.safetensors is not in the index, but mlx-lm")
    assert GENERIC not in error
    (made / INDEX).unlink()
    error = verify(made, "model-old.safetensors is not used, but mlx-lm loads it")
    assert GENERIC not in error
    extra.unlink()
    content = bytearray((made / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (made / "model.safetensors").write_bytes(content)
    assert verify(made, "has changed since it was converted").endswith(f"{GENERIC}\n")
