"""chat_template.jinja: which folders have one, and which source's is recognized."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import call, expect_error, make_source
from models import SCALED, small_tokenizer
from sentencepieces import SIZE, train

from converters.conversion.run import convert
from mlx_openelm.storage.chat_template_file import write_chat_template
from mlx_openelm.storage.loading import load
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.storage.tokenizer_finder import write_tokenizer
from mlx_openelm.text.added_tokens import AddedToken, AddedTokens
from mlx_openelm.text.chat_templates import chat_template
from mlx_openelm.text.tokenizer import Tokenizer

FILE = "chat_template.jinja"


@pytest.fixture(name="source")
def _source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source", config=SCALED)


def converted(source: Path, name: str = "made", **options: Any) -> Path:
    report = convert(source, source.parent / name, receipt=False, **options)
    return Path(report.path)


def store_template(folder: Path, template: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["mlx_openelm"] = {"template": template}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_base_model_has_none(source: Path) -> None:
    assert not (converted(source) / FILE).exists()


def test_an_instruct_model_has_one_through_several_conversions(source: Path) -> None:
    named = source.rename(source.with_name("OpenELM-Tiny-Instruct"))
    made = converted(named)
    assert (made / FILE).read_text() == chat_template("instruct")
    again = converted(made, "again", bits=4, group_size=32)
    assert (again / FILE).read_text() == chat_template("instruct")
    assert "chat_template.jinja" in open_folder(again).metadata["files"]
    (again / FILE).write_text("other")
    assert FILE in call("verify", again).stdout


@pytest.mark.parametrize("template", ["alpaca", "openelm-peft", "raw"])
def test_a_stored_template_decides_not_the_name_or_the_file(
    source: Path, template: str
) -> None:
    source = source.rename(source.with_name("Tiny-Instruct"))
    store_template(source, template)
    (source / FILE).write_text(chat_template("instruct") or "")
    made = converted(source)
    assert open_folder(made).template == template
    written = (made / FILE).read_text() if (made / FILE).exists() else None
    assert written == chat_template(template)


@pytest.mark.parametrize("in_config", [False, True])
def test_a_known_template_of_another_tool_is_kept(
    source: Path, in_config: bool
) -> None:
    text = chat_template("alpaca")
    if in_config:  # as transformers 4 did
        described = {"chat_template": text}
        (source / "tokenizer_config.json").write_text(json.dumps(described))
    else:
        (source / FILE).write_text(f"{text}\n")
    assert load(str(source))[1].template == "alpaca"
    made = converted(source)
    assert (made / FILE).read_text() == text
    assert open_folder(made).metadata["template"] == "alpaca"


def test_an_unknown_template_of_another_tool_is_left_out_with_a_note(
    source: Path,
) -> None:
    source = source.rename(source.with_name("Tiny-Instruct"))
    (source / FILE).write_text("{{ messages }}")
    report = convert(source, source.parent / "made")
    assert any("Left out the chat template" in note for note in report.notes)
    assert not (report.path / FILE).exists()
    assert open_folder(report.path).template is None


@pytest.mark.parametrize("to", ["mlx", "hf", "gguf"])
def test_a_stored_template_that_jinja_lacks_is_an_error(source: Path, to: str) -> None:
    store_template(source, "poem")
    message = "The stored template 'poem' has no chat template for other tools"
    target = source.parent / ("out.gguf" if to == "gguf" else "out")
    args = ("convert", source, "--mlx-path", target, "--to", to)
    expect_error(source.parent, *args, message=message)


def test_a_damaged_file_is_an_error(source: Path) -> None:
    (source / FILE).write_bytes(b"\xff\xfe{")
    args = ("convert", source, "--mlx-path", source.parent / "out")
    expect_error(source.parent, *args, message=FILE)


def test_without_a_tokenizer_it_is_written_too(source: Path) -> None:
    store_template(source, "instruct")
    assert (converted(source, tokenizer="none") / FILE).exists()


def test_it_is_left_out_if_added_tokens_would_change_the_ids(tmp_path: Path) -> None:
    plain, token = train(), AddedToken(SIZE, "<pad>", special=True)
    for spaces_each in (True, False):
        folder = tmp_path / str(spaces_each)
        folder.mkdir()
        added = AddedTokens([token], spaces_each=spaces_each)
        tokenizer = Tokenizer(plain.model_proto, added=added)
        write_tokenizer(tokenizer, folder)
        notes = write_chat_template(folder, "instruct", tokenizer)
        assert (folder / FILE).exists() is spaces_each
        assert len(notes) == (0 if spaces_each else 1)


def test_raw_writes_nothing(tmp_path: Path) -> None:
    assert write_chat_template(tmp_path, "raw", small_tokenizer()) == ()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("template", ["alpaca", "raw"])
def test_a_fused_model_has_the_template_of_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.chdir(tmp_path)
    record = json.dumps({"prompt": "Who was the king?", "completion": "He was old."})
    Path("data.jsonl").write_text(f"{record}\n" * 8)
    options = ("--iters", 2, "--batch-size", 1, "--rank", 2, "--num-layers", 1)
    args = ("--data", "data.jsonl", "--template", template, "--learning-rate", 0.01)
    result = call("lora", *args, *options, "--adapter-path", "adapter")
    assert result.exit_code == 0, result.stderr
    fused = call("fuse", "--adapter-path", "adapter", "--save-path", "fused")
    assert fused.exit_code == 0, fused.stderr
    path = Path("fused", FILE)
    assert (path.read_text() if path.exists() else None) == chat_template(template)
    assert open_folder(Path("fused")).template == template


def test_verify_notes_a_missing_and_an_unknown_file(source: Path) -> None:
    made = converted(source)
    assert FILE not in call("verify", made).output
    (made / FILE).write_text("{{ messages }}")
    shown = call("verify", made)
    assert f"It has a {FILE}, which mlx-lm applies to every prompt" in shown.stderr
    (made / FILE).unlink()
    store_template(made, "instruct")  # as before these files were written
    shown = call("verify", made)
    assert shown.exit_code == 0
    assert f"It has no {FILE}" in shown.stderr
    assert "template instruct" in shown.stderr
