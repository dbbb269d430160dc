"""An adapter, or a file that contains one, where a model is needed."""

import shlex

import pytest
from commands import call, expect_error
from models import (
    UNEVEN,
    in_corenet,
    make_factors,
    small_tokenizer,
    weights_of,
    write_hugging_face,
    write_mlx_lm_adapter,
    write_peft_folder,
    write_pt,
)

from converters.pretraining import model_sources
from mlx_openelm.errors import OpenELMError

pytest.importorskip("torch", reason="needs PyTorch to write .pt files")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A model, and its adapter in three formats."""
    monkeypatch.chdir(tmp_path)
    weights = weights_of(UNEVEN)
    factors = make_factors(weights, ("layers.0.attn.out_proj",))
    write_hugging_face(tmp_path / "model", UNEVEN, weights)
    (tmp_path / "model" / "tokenizer.model").write_bytes(small_tokenizer().model_proto)
    write_mlx_lm_adapter(tmp_path / "an adapter", factors)
    write_peft_folder(tmp_path / "peft", factors)
    write_pt(tmp_path / "lora.pt", in_corenet(weights, factors))
    return tmp_path


@pytest.mark.parametrize("name", ["an adapter", "peft"])
def test_parity_names_the_command_that_merges_an_adapter(work, name):
    command = f"convert {shlex.quote(name)} --merge"
    message = [f"{name} is an adapter", f"`mlx-openelm {command}`"]
    expect_error(work, "parity", name, message=message)
    result = call(*shlex.split(command), "--model", "model", "--mlx-path", "merged")
    assert result.exit_code == 0, result.stderr
    assert call("parity", "merged", "--num-tokens", "4").exit_code == 0


@pytest.mark.parametrize("name", ["an adapter", "peft", "lora.pt"])
@pytest.mark.parametrize(
    "command",
    [
        ("grow", "{}", "--width", "2"),
        ("fuse", "--adapter-path", "an adapter", "--save-path", "x", "--model", "{}"),
        ("convert", "peft", "--merge", "--model", "{}"),
    ],
    ids=lambda command: command[0],
)
def test_a_base_that_has_an_adapter_is_refused(work, name, command):
    arguments = [part.format(name) for part in command]
    message = [f"{name} ", " an adapter", f"convert {shlex.quote(name)} --merge"]
    expect_error(work, *arguments, message=message)


@pytest.mark.parametrize("name", ["an adapter", "peft", "lora.pt"])
def test_initial_weights_with_an_adapter_are_refused(work, name):
    """Without this, training would start from the base alone."""
    with pytest.raises(OpenELMError, match=f"{name} .* an adapter.*--merge"):
        model_sources.open_model(name)
