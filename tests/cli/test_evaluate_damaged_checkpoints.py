"""`evaluate --checkpoints` where one of them is damaged; `--force`; finished scores."""

import json

import numpy as np
import pytest
from commands import call, expect_error
from models import (
    TEXT,
    UNEVEN,
    in_corenet,
    make_factors,
    small_tokenizer,
    weights_of,
    write_pt,
)

import mlx_openelm
from mlx_openelm.storage import loading

pytest.importorskip("torch", reason="needs PyTorch to write .pt files")

NAMES = [f"iter_{step}.pt" for step in (1000, 2000, 3000)]
ARGS = ("evaluate", "--text", "text.txt", "--checkpoints")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Three checkpoints, a tokenizer and a text."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        write_pt(tmp_path / name, weights_of(UNEVEN, seed))
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer().model_proto)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def test_all_bad_checkpoints_are_named_before_one_is_scored(work, monkeypatch):
    data = (work / NAMES[1]).read_bytes()
    (work / NAMES[1]).write_bytes(data[: len(data) // 2])
    (work / "folder").mkdir()
    (work / "folder" / "config.json").write_text("{}")
    monkeypatch.setattr(loading, "load_model", None)  # a call would fail
    message = [NAMES[1], "There is no checkpoint gone.pt", "folder"]
    error = expect_error(work, *ARGS, *NAMES, "gone.pt", "folder", message=message)
    assert NAMES[0] not in error
    assert NAMES[2] not in error


def test_a_folder_without_checkpoints_is_an_error(work):
    (work / "run").mkdir()
    message = "run has neither checkpoint_epoch_*_iter_*.pt nor config.json; pass a"
    expect_error(work, *ARGS, "run", message=message)


def test_a_checkpoint_without_a_tokenizer_is_named_before_one_is_scored(work):
    mlx_openelm.convert(NAMES[0], "a", dtype="float32", receipt=False)
    mlx_openelm.convert(NAMES[1], "b", dtype="float32", receipt=False)
    for name in ("tokenizer.model", "tokenizer.json"):
        (work / "b" / name).unlink(missing_ok=True)
    error = expect_error(work, *ARGS, "a", "b", message="b holds no tokenizer.model")
    assert error.count("error:") == 1


def test_an_adapter_in_a_file_is_merged_by_the_proposed_command(work):
    weights = weights_of(UNEVEN)
    factors = make_factors(weights, ("layers.0.attn.out_proj",))
    write_pt(work / "iter_4000.pt", in_corenet(weights, factors))
    command = "`mlx-openelm convert iter_4000.pt --merge`"
    message = ["iter_4000.pt contains an adapter", command]
    expect_error(work, *ARGS, NAMES[0], "iter_4000.pt", message=message)
    assert call("convert", "iter_4000.pt", "--merge", "--quiet").exit_code == 0
    result = call(*ARGS, NAMES[0], "iter_4000-mlx")
    assert result.exit_code == 0, result.stderr


def damage_a_weight(path):
    """Write NaN, which is only noticed when the weights are read."""
    weights = weights_of(UNEVEN, 5)
    weights["layers.0.ffn.proj_1.weight"][0, 0] = np.nan
    write_pt(path, weights)


@pytest.mark.parametrize("as_json", [False, True])
def test_finished_scores_are_written_before_the_error(work, as_json):
    expected = json.loads(call(*ARGS, NAMES[0], "--json").stdout)["checkpoints"][0]
    damage_a_weight(work / NAMES[1])
    flags = ("--json",) if as_json else ()
    result = call(*ARGS, *NAMES, "--csv", "a.csv", "--picture", "a.svg", *flags)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert NAMES[1] in result.stderr
    if as_json:
        assert json.loads(result.stdout)["checkpoints"] == [expected]
    else:
        assert f"{expected['bits_per_byte']:.4f}" in result.stdout
    assert NAMES[0] in (work / "a.csv").read_text()
    assert (work / "a.svg").is_file()


def test_the_same_command_resumes_after_an_error(work):
    damage_a_weight(work / NAMES[1])
    reports = ("--csv", "a.csv", "--picture", "a.svg")
    command = (*ARGS, *NAMES, "--output", "kept", *reports)
    result = call(*command)
    assert result.exit_code == 1
    assert NAMES[0] in result.stdout  # the scores until then
    write_pt(work / NAMES[1], weights_of(UNEVEN, 5))
    result = call(*command)
    assert result.exit_code == 0, result.stderr
    assert NAMES[2] in (work / "a.csv").read_text()
    assert (work / "a.svg").is_file()


def test_a_problem_of_all_checkpoints_is_told_once(work):
    (work / "tokenizer.model").unlink()
    message = f"{', '.join(NAMES)}: There is no file or folder nowhere."
    error = expect_error(work, *ARGS, *NAMES, "--tokenizer", "nowhere", message=message)
    assert error.count("--tokenizer FILE") == 1


def test_a_model_that_fails_is_named_after_the_scores_before_it(work):
    for name in NAMES[:2]:
        mlx_openelm.convert(name, name[:-3], dtype="float32", receipt=False)
    weights = work / "iter_2000" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-64:] = b"\xff" * 64  # NaN, which the header does not show
    weights.write_bytes(content)
    alone = ("evaluate", "--text", "text.txt", "--json", "--model", "iter_1000")
    result = call(*alone, "--compare", "iter_2000")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: iter_2000: ")
    assert json.loads(result.stdout) == json.loads(call(*alone).stdout)


def test_force_replaces_stored_scores(work):
    args = (*ARGS, NAMES[0], "--output", "kept", "--json")
    scores = json.loads(call(*args).stdout)
    stored = work / "kept" / NAMES[0] / "scores.json"
    content = json.loads(stored.read_text())
    content["scores"]["text"]["nats_per_token"] = -1.0
    stored.write_text(json.dumps(content))
    changed = json.loads(call(*args).stdout)  # taken over
    assert changed["checkpoints"][0]["nats_per_token"] == -1.0
    assert json.loads(call(*args, "--force").stdout) == scores
    assert json.loads(call(*args).stdout) == scores
