"""What an error advises is done here, and helps."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from commands import call, expect_error
from models import UNEVEN, make_factors, weights_of, write_mlx_lm_adapter, write_pt

from mlx_openelm.errors import MAX_LENGTH

GENERATE = ("generate", "Hi", "-m", "2", "--quiet", "--model")


def follow(error: str) -> str:
    """Run the command in an error; return the path that it writes."""
    command = re.search(r"`mlx-openelm ([^`]+)`", error)
    assert command, error
    result = call(*shlex.split(command[1]), "--quiet")
    assert result.exit_code == 0, result.stderr
    return result.stdout.strip()


def pass_instead(error: str) -> str:
    """Return the path or id that an error asks for."""
    advice = re.search(r"; pass (?:the folder|its Hub id), (\S+?)\.\n$", error)
    assert advice, error
    return advice[1]


@pytest.fixture(name="adapter")
def _adapter(here):
    factors = make_factors(weights_of(UNEVEN), ("layers.0.attn.out_proj",))
    folder = write_mlx_lm_adapter(here / "adapters" / "mine", factors)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "model"}))
    return "adapters/mine"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.model"]
)
@pytest.mark.parametrize("command", [GENERATE, ("convert",), ("verify",), ("inspect",)])
def test_a_file_of_a_model_folder(here, command, file):
    error = expect_error(
        here, *command, f"model/{file}", message="one file of a model folder"
    )
    result = call(*command, pass_instead(error))
    assert result.exit_code == 0, result.stderr


def test_the_file_of_an_adapter(here, adapter):
    file = f"{adapter}/adapters.safetensors"
    options = ("generate", "Hi", "-m", "2", "--adapter-path")
    error = expect_error(here, *options, file, message="not an adapter folder")
    result = call(*options, pass_instead(error))
    assert result.exit_code == 0, result.stderr
    message = "one file of an adapter folder; pass the folder, adapters/mine"
    expect_error(here, "convert", file, message=message)


def test_a_checkpoint_in_place_of_a_model_folder(here):
    pytest.importorskip("torch")
    shutil.copy("source/tokenizer.model", here)
    write_pt(here / "my weights.pt", weights_of(UNEVEN))
    error = expect_error(here, *GENERATE, "my weights.pt", message="'my weights.pt'")
    assert call(*GENERATE, follow(error)).exit_code == 0


@pytest.mark.parametrize("kind", ["bin", "pt"])
def test_a_folder_of_another_format(here, kind):
    pytest.importorskip("torch")
    source = here / "source"
    (source / "model.safetensors").unlink()
    weights = {f"transformer.{n}": w for n, w in weights_of(UNEVEN).items()}
    write_pt(source / ("pytorch_model.bin" if kind == "bin" else "a.pt"), weights)
    error = expect_error(
        here, *GENERATE, "source", message="holds no model*.safetensors, only"
    )
    assert call(*GENERATE, follow(error)).exit_code == 0


def test_a_file_that_no_command_reads(here):
    (here / "notes.txt").write_text("no model")
    error = expect_error(
        here, *GENERATE, "notes.txt", message="is a file, not a model folder"
    )
    assert "convert" not in error


@pytest.mark.parametrize(
    ("address", "revision"),
    [
        ("https://huggingface.co/apple/OpenELM-270M/tree/main", ""),
        ("https://huggingface.co/apple/OpenELM-270M", ""),
        ("huggingface.co/apple/OpenELM-270M/", ""),
        ("https://hf.co/apple/OpenELM-270M?library=mlx", ""),
        ("hf://apple/OpenELM-270M", ""),
        ("https://huggingface.co/apple/OpenELM-270M.git", ""),
        ("HTTPS://HuggingFace.co:443/apple/OpenELM-270M", ""),
        ("HF.co/apple/OpenELM-270M", ""),
        ("//huggingface.co/apple/OpenELM-270M", ""),
        ("git@hf.co:apple/OpenELM-270M", ""),
        ("hf://models/apple/OpenELM-270M@main", ""),
        ("https://huggingface.co/api/models/apple/OpenELM-270M", ""),
        ("https://huggingface.co/apple/OpenELM-270M/blob/v2/a.safetensors", "v2"),
        ("https://huggingface.co/apple/OpenELM-270M/tree/refs/pr/1/a", "refs/pr/1"),
        ("https://huggingface.co/apple/OpenELM-270M/raw/refs%2Fpr%2F1/a", "refs/pr/1"),
        ("hf://apple/OpenELM-270M@v2", "v2"),
    ],
)
def test_the_address_of_a_page_on_the_hub(here, address, revision):
    message = "is the address of a page; pass its Hub id, apple/OpenELM-270M"
    for command in (("convert",), ("verify",), GENERATE, ("inspect",)):
        error = expect_error(here, *command, address, message=message)
        advice = f"`mlx-openelm convert apple/OpenELM-270M --revision {revision}`"
        assert (advice in error) == bool(revision), error
    expect_error(here, "convert", "source", "--tokenizer", address, message=message)
    adapter = ("--adapter-path", address)
    expect_error(here, "generate", "Hi", *adapter, message=message)
    expect_error(here, "fuse", *adapter, "--save-path", "x", message=message)
    # The id is looked up: it passes all checks of names.
    message = "apple/OpenELM-270M is not a local folder, and the local cache"
    expect_error(here, "convert", "apple/OpenELM-270M", message=message)


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/datasets/a/b",
        "https://huggingface.co",
        "https://huggingface.co/apple",
        "https://huggingface.co/papers/2404.14619",
        "https://huggingface.co/collections/apple/openelm-instruct-models-6619",
        "https://huggingface.co/docs/transformers/openelm",
        "https://huggingface.co/models?search=openelm",
        "https://huggingface.co/api/datasets/a/b",
        "hf://datasets/a/b",
        "https://[huggingface.co/apple/OpenELM-270M",
        "file:///folder/model",
    ],
)
def test_another_web_address(here, address):
    message = "is a web address, but not the page of a model on the Hub"
    expect_error(here, "convert", address, message=message)


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "Hi"),
        ("chat",),
        ("evaluate", "--text", "text.txt"),
        ("bench",),
        ("serve",),
        ("fuse", "--save-path", "x"),
    ],
)
def test_an_adapter_that_is_not_there(here, adapter, command):
    (here / "text.txt").write_text("Once upon a time")
    for name in ("nowhere", "./nowhere", "model/nowhere"):
        message = f"no adapter folder {name.removeprefix('./')}; check --adapter-path."
        expect_error(here, *command, "--adapter-path", name, message=message)
    message = "no adapter folder adapters/min; check --adapter-path. Similar names: ad"
    expect_error(here, *command, "--adapter-path", "adapters/min", message=message)


def test_a_model_and_an_adapter_in_each_others_place(here, adapter):
    message = "it is a model, pass it as --model"
    expect_error(here, "generate", "Hi", "--adapter-path", "model", message=message)
    message = "is an adapter, not a model; pass it as --adapter-path."
    expect_error(here, "generate", "Hi", "--model", adapter, message=message)
    assert call("generate", "Hi", "-m", "2", "--adapter-path", adapter).exit_code == 0
    fused = f"{Path(adapter).name}-fused"
    command = ("fuse", "--adapter-path", str(adapter), "--save-path", fused)
    message = f"adapter; merge it into its base: `mlx-openelm {shlex.join(command)}`"
    (here / "x.jsonl").write_text('{"text": "Once upon a time"}')
    lora = ("lora", "--data", "x.jsonl", "--model", adapter)  # writes --adapter-path
    for args in (("inspect", adapter), ("verify", adapter), lora):
        expect_error(here, *args, message=message)
    assert call(*command).exit_code == 0
    assert call("inspect", fused).exit_code == 0


def test_a_very_long_error_keeps_its_advice(here):
    name = "no/" * 600 + "x"
    error = expect_error(here, "inspect", name, message="There is no folder no/no")
    assert MAX_LENGTH - 100 < len(error) < MAX_LENGTH + 40
    assert "apple/OpenELM-3B-Instruct" in error


def test_data_that_is_not_there(here):
    message = "There is no file or folder x.jsonl. This folder contains no record file."
    expect_error(here, "lora", "--data", "x.jsonl", message=message)
    message = "model/x.jsonl. The folder model contains config.json, "
    expect_error(here, "lora", "--data", "model/x.jsonl", message=message)
