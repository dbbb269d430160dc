"""Training checkpoints: raw and averaged weights, and copies of a tied head."""

import json
from dataclasses import replace

import numpy as np
import pytest
from commands import call, expect_error
from models import UNEVEN, weights_of

from converters.conversion.run import convert
from converters.conversion.verification import verify
from converters.formats.pt_reader import read_checkpoint
from converters.formats.sources import open_path
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.storage.shards import write_json
from mlx_openelm.tensor_names import EMBEDDING, HEAD

torch = pytest.importorskip("torch", reason="needs PyTorch to write .pt files")

UNTIED = replace(UNEVEN, share_input_output_layers=False)
WEIGHTS = weights_of(UNEVEN)


def state(factor: float = 1.0, prefix: str = "") -> dict:
    return {
        prefix + n: torch.from_numpy(w * np.float32(factor)) for n, w in WEIGHTS.items()
    }


def read_norm(path, weights=None) -> float:
    read = open_path(path, weights).tensors["norm.weight"].read()
    return float((read / WEIGHTS["norm.weight"])[0])


# Raw and averaged weights --------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["ema_state_dict", "ema", "model_ema", "state_dict_ema", "ema_model", "swa_model"],
)
@pytest.mark.parametrize("model_key", ["model_state_dict", "state_dict", "model"])
def test_the_weights_of_a_training_can_be_chosen(tmp_path, key, model_key):
    path = tmp_path / "a.pt"
    torch.save({"epoch": 1, key: state(0.5), model_key: state()}, path)
    source = open_path(path)
    assert source.notes[:2] == (
        f"Weights: {model_key} of a.pt, not {key}.",
        "`mlx-openelm convert` with `weights` ema uses the moving average (EMA) "
        "instead.",
    )
    assert read_norm(path) == read_norm(path, "model") == 1.0
    assert read_norm(path, "ema") == 0.5
    assert open_path(path, "ema").notes[0] == (
        f"Weights: {key} (moving average, EMA) of a.pt, not {model_key}."
    )


def test_an_average_without_raw_weights_is_named(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"ema_state_dict": state(0.5)}, path)
    assert read_norm(path) == 0.5
    assert "ema_state_dict (moving average, EMA)" in open_path(path).notes[0]
    message = "has no model weights, only ema_state_dict"
    expect_error(tmp_path, "convert", path, "--weights", "model", message=message)


@pytest.mark.parametrize(
    ("saved", "key"),
    [
        (
            lambda raw, mean: {"model": raw, "ema": {"decay": 0.9, "shadow": mean}},
            "ema",
        ),
        (lambda raw, mean: {"model": raw, "ema": {"module": mean, "n": 3}}, "ema"),
        (
            lambda raw, mean: {
                "state_dict": {f"model.{n}": t for n, t in raw.items()}
                | {f"ema_model.{n}": t for n, t in mean.items()}
            },
            "state_dict ema_model.*",
        ),
    ],
    ids=["shadow", "module", "prefix"],
)
def test_averages_are_found_where_trainers_put_them(tmp_path, saved, key):
    path = tmp_path / "a.pt"
    torch.save(saved(state(), state(0.5)), path)
    assert read_norm(path) == 1.0
    assert read_norm(path, "ema") == 0.5
    assert f"not {key}." in open_path(path).notes[0]


def test_torchs_averaged_model_is_named(tmp_path):
    path = tmp_path / "a.pt"
    saved = state(0.5, prefix="module.") | {"n_averaged": torch.tensor(4)}
    torch.save(saved, path)
    assert read_norm(path) == read_norm(path, "ema") == 0.5
    assert "moving average, EMA" in open_path(path).notes[0]


def test_settings_of_an_average_are_not_weights(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model_state_dict": state(), "ema": {"decay": 0.999}}, path)
    assert read_checkpoint(path).notes == ()
    message = ["has no EMA weights, only model_state_dict", "leave out --weights"]
    expect_error(tmp_path, "convert", path, "--weights", "ema", message=message)
    torch.save(state(), path)
    message = ["has no EMA weights", "leave out --weights"]
    expect_error(tmp_path, "convert", path, "--weights", "ema", message=message)


def test_weights_of_a_folder_cannot_be_chosen(here):
    message = "--weights applies to a .pt file with EMA weights, but source is a folder"
    expect_error(here, "convert", "source", "--weights", "ema", message=message)


def test_verify_compares_with_the_chosen_weights(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model_state_dict": state(), "ema_state_dict": state(0.5)}, path)
    for weights in ("model", "ema"):
        made = tmp_path / weights
        convert(path, made, weights=weights, tokenizer="none")
        assert verify(made, against=[str(path)]).passed, weights
    config = json.loads((tmp_path / "ema/config.json").read_text())
    assert config["mlx_openelm"]["options"]["weights"] == "ema"
    config["mlx_openelm"]["options"]["weights"] = "model"
    write_json(tmp_path / "ema/config.json", config)
    assert not verify(tmp_path / "ema", against=[str(path)]).passed


# Copies of a tied head -----------------------------------------------------------


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", [HEAD, "module.classifier.weight"])
def test_a_copy_of_the_embedding_is_left_out(tmp_path, with_config, name):
    path = tmp_path / "a.pt"
    saved = state(prefix="module.")
    torch.save({**saved, name: saved[f"module.{EMBEDDING}"].clone()}, path)
    if with_config:
        write_json(tmp_path / "config.json", UNEVEN.to_dict())
    source = open_path(path)
    assert source.config.share_input_output_layers
    assert source.tensors.keys() == UNEVEN.tensor_shapes().keys()
    assert f"Left out {name}, a copy of the tied embedding." in source.notes


def test_a_head_of_its_own_is_kept_or_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({n: torch.from_numpy(w) for n, w in weights_of(UNTIED).items()}, path)
    assert not open_path(path).config.share_input_output_layers
    write_json(tmp_path / "config.json", UNEVEN.to_dict())
    message = ["lm_head.weight differs from it", "correct share_input_output_layers"]
    expect_error(tmp_path, "convert", path, message=message)
    write_json(tmp_path / "config.json", UNTIED.to_dict())
    copied = {**state(), HEAD: state()[EMBEDDING]}  # untied message the config
    torch.save(copied, path)
    assert not open_path(path).config.share_input_output_layers


# Our metadata beside another tool's weights --------------------------------------


def rewrite(folder, factor=1.0):
    """Write the weights again, as another tool does."""
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {n: w * np.float32(factor) for n, w in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(name="rewritten")
def _rewritten(here):
    convert("source", "made", bits=4, group_size=32)
    config = json.loads((here / "made/config.json").read_text())
    config["mlx_openelm"]["template"] = "instruct"
    made = here / "other"
    convert("source", made, dtype="float32")
    plain = json.loads((made / "config.json").read_text())
    write_json(made / "config.json", plain | {"mlx_openelm": config["mlx_openelm"]})
    rewrite(made)
    return made


def test_a_folder_that_another_tool_wrote_passes_with_a_note(rewritten):
    result = call("verify", rewritten)
    assert result.exit_code == 0, result.stderr
    assert "Another tool has written these weights" in result.stderr


def test_a_receipt_of_other_weights_is_not_shown(rewritten):
    shown = json.loads(call("inspect", rewritten, "--json").stdout)
    assert shown["receipt"] is None
    assert shown["options"] == {}
    assert shown["rewritten"] is True
    assert shown["template"] == "instruct"  # it does not depend on the weights
    assert "rewritten by another tool" in call("inspect", rewritten).stdout


def test_our_own_folders_are_recognised(here):
    for to in ("mlx", "hf"):
        for options in (
            {"dtype": "float32"},
            {"bits": 4, "group_size": 32} if to == "mlx" else {},
        ):
            made = here / f"{to}{len(options)}"
            convert("source", made, to=to, receipt=False, **options)
            assert open_folder(made).metadata["files"]
            assert call("verify", made).stderr == ""


def test_the_entry_of_other_weights_is_kept_as_history(rewritten, here):
    report = convert(rewritten, here / "again")
    assert report.kind == "Hugging Face folder"
    metadata = open_folder(here / "again").metadata
    assert metadata["template"] == "instruct"
    assert metadata["source"]["was"]["before"]["receipt"]
    assert "receipt" not in metadata
