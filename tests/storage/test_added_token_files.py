"""The tokens that a fine-tune added are read from any of transformers' files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sentencepieces import SIZE, Edit, edited, train

from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.tokenizer_finder import (
    PROBES,
    find_tokenizer,
    read_tokenizer,
    verify_same,
    verify_tokenizer,
    write_tokenizer,
)
from mlx_openelm.text.added_tokens import AddedToken, AddedTokens
from mlx_openelm.text.tokenizer import Tokenizer

PLAIN = train()
PAD = AddedToken(SIZE, "<pad>", special=True)
USER = AddedToken(SIZE + 1, "<|user|>")
TEXT = "the <|user|>on<pad>"


def entry(token: AddedToken) -> dict[str, Any]:
    flags = ("content", "special", "single_word", "lstrip", "rstrip", "normalized")
    return {name: getattr(token, name) for name in flags}


def put(folder: Path, **files: Any) -> Path:
    """Write tokenizer.model and JSON files, named without their suffix."""
    (folder / "tokenizer.model").write_bytes(PLAIN.model_proto)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def in_json(file: dict[str, Any]) -> None:
    file["added_tokens"] += [{"id": t.id, **entry(t)} for t in (PAD, USER)]


def check(tokenizer: Tokenizer) -> None:
    assert list(tokenizer.added.by_id.values()) == [PAD, USER]
    ids = tokenizer.encode(TEXT)
    on = PLAIN.encode("on", bos=False)
    assert ids == [*PLAIN.encode("the "), SIZE + 1, *on, SIZE]
    assert tokenizer.decode(ids) == "the <|user|> on"
    verify_tokenizer(tokenizer, SIZE + 2)


def test_tokenizer_json_has_all_of_them(tmp_path: Path) -> None:
    file = edited(PLAIN, tmp_path, in_json)
    check(read_tokenizer(file, num_rows=SIZE + 2))
    check(read_tokenizer(put(tmp_path), num_rows=SIZE + 2))
    check(read_tokenizer(tmp_path / "tokenizer.model", num_rows=SIZE + 5))
    check(find_tokenizer(tmp_path, None, SIZE + 2).tokenizer)


def test_some_list_them_in_the_vocabulary_too(tmp_path: Path) -> None:
    def edit(file: dict[str, Any]) -> None:
        in_json(file)
        file["model"]["vocab"] |= {t.content: t.id for t in (PAD, USER)}

    check(read_tokenizer(edited(PLAIN, tmp_path, edit), num_rows=SIZE + 2))


@pytest.mark.parametrize("role", ["pad_token", "additional_special_tokens"])
@pytest.mark.parametrize("as_mapping", [True, False])
def test_the_files_of_transformers_4_are_read(
    tmp_path: Path, role: str, as_mapping: bool
) -> None:
    value: Any = entry(PAD) if as_mapping else "<pad>"
    value = [value] if role.startswith("additional") else value
    ids = {t.content: t.id for t in (PAD, USER)}
    folder = put(tmp_path, added_tokens=ids, special_tokens_map={role: value})
    check(read_tokenizer(folder, num_rows=SIZE + 2))


def test_the_config_of_transformers_4_has_the_flags(tmp_path: Path) -> None:
    decoder = {str(t.id): entry(t) for t in (PAD, USER)}
    folder = put(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    check(read_tokenizer(folder, num_rows=SIZE + 2))


def test_legacy_false_puts_no_space_after_an_added_token(tmp_path: Path) -> None:
    ids = {"<|user|>": SIZE}
    folder = put(tmp_path, added_tokens=ids, tokenizer_config={"legacy": False})
    tokenizer = read_tokenizer(folder, num_rows=SIZE + 1)
    assert not tokenizer.added.spaces_each
    assert tokenizer.decode(tokenizer.encode("the<|user|>on")) == "the<|user|>on"


def metaspace(scheme: str, *, as_sequence: bool, normalizer: Any = None) -> Edit:
    pre_tokenizer: dict[str, Any] = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": scheme,
        "split": False,
    }
    if as_sequence:
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [pre_tokenizer]}

    def edit(file: dict[str, Any]) -> None:
        in_json(file)
        file.update(normalizer=normalizer, pre_tokenizer=pre_tokenizer)

    return edit


ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
KEEP = {
    "type": "Replace",
    "pattern": {"Regex": "\\A\u2581"},
    "content": "\u2581\u2581",
}


@pytest.mark.parametrize(
    ("edit", "spaces_each"),
    [
        (metaspace("always", as_sequence=False), True),
        (metaspace("first", as_sequence=False), False),
        (
            metaspace(
                "always",
                as_sequence=True,
                normalizer={"type": "Sequence", "normalizers": [ESCAPE, KEEP]},
            ),
            True,
        ),
        (
            metaspace(
                "first",
                as_sequence=True,
                normalizer={"type": "Sequence", "normalizers": [ESCAPE]},
            ),
            False,
        ),
    ],
)
def test_the_forms_of_transformers_5_are_read(
    tmp_path: Path, edit: Edit, spaces_each: bool
) -> None:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    file = edited(PLAIN, tmp_path, edit)
    theirs = HuggingFaceTokenizer.from_file(str(file))
    tokenizer = read_tokenizer(file, num_rows=SIZE + 2)
    assert tokenizer.added.spaces_each == spaces_each
    for text in (TEXT, "<|user|>the", "the<|user|>on<|user|>", "<pad><pad>"):
        assert tokenizer.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("spaces_each", [True, False])
def test_a_written_folder_keeps_them(tmp_path: Path, spaces_each: bool) -> None:
    roles = {"pad_token": "<pad>", "eos_token": "<|user|>"}
    end = replace(USER, special=True)
    added = AddedTokens([PAD, end], roles=roles, spaces_each=spaces_each)
    tokenizer = Tokenizer(PLAIN.model_proto, added=added)
    write_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["pad_token"] == "<pad>"
    assert config["eos_token"] == "<|user|>"
    for name in ("tokenizer.model", "tokenizer.json"):
        again = read_tokenizer(tmp_path / name, num_rows=SIZE + 2)
        assert again.added == added
        assert again.added.roles == roles
        assert again.eos_id == SIZE + 1
        verify_tokenizer(again, SIZE + 2)
        verify_same((tmp_path / "tokenizer.json").read_text(), again)


@pytest.mark.interop
@pytest.mark.parametrize("spaces_each", [True, False])
def test_transformers_and_mlx_lm_read_the_same(
    tmp_path: Path, spaces_each: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from mlx_lm.utils import load_tokenizer
    from transformers import AutoTokenizer

    added = AddedTokens(
        [PAD, USER], roles={"pad_token": "<pad>"}, spaces_each=spaces_each
    )
    tokenizer = Tokenizer(PLAIN.model_proto, added=added)
    write_tokenizer(tokenizer, tmp_path)
    loaders: list[Any] = [AutoTokenizer.from_pretrained, load_tokenizer]
    for load in loaders:
        theirs = load(tmp_path)
        assert theirs.pad_token_id == SIZE
        for text in (TEXT, "<|user|> the\n<|user|>on", *PROBES):
            ids = tokenizer.encode(text)
            assert theirs.encode(text) == ids, repr(text)
            assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_tokens_without_a_row_are_left_out(tmp_path: Path) -> None:
    folder = put(tmp_path, added_tokens={"<pad>": SIZE, "<x>": SIZE + 1})
    tokenizer = read_tokenizer(folder, num_rows=SIZE + 1)
    assert list(tokenizer.added.by_id) == [SIZE]
    for rows in (None, SIZE):
        assert not read_tokenizer(folder, num_rows=rows).added
    file = edited(PLAIN, tmp_path, in_json)
    with pytest.raises(OpenELMError, match=r"no rows for .*<\|user\|>"):
        read_tokenizer(file, num_rows=SIZE + 1)


def test_files_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    decoder = {str(SIZE): entry(PAD)}
    folder = put(
        tmp_path,
        added_tokens={"<x>": SIZE},
        tokenizer_config={"added_tokens_decoder": decoder},
    )
    with pytest.raises(OpenELMError, match="remove the file") as error:
        read_tokenizer(folder, num_rows=SIZE + 1)
    for part in ("tokenizer_config.json", "added_tokens.json", "<pad>", "<x>"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<pad>": "x"}},
        {"added_tokens": {"<pad>": [1]}},
        {"tokenizer_config": {"added_tokens_decoder": [1]}},
        {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}},
        {"tokenizer_config": {"added_tokens_decoder": {"5": 5}}},
        {"tokenizer": {"added_tokens": 5}},
        {"tokenizer": {}},
        {"tokenizer": {"added_tokens": [], "normalizer": 5}},
        {"special_tokens_map": [1]},
        {"added_tokens": 3},
    ],
)
def test_a_damaged_file_is_one_error(tmp_path: Path, files: dict[str, Any]) -> None:
    with pytest.raises(OpenELMError) as error:
        read_tokenizer(put(tmp_path, **files), num_rows=SIZE + 1)
    assert f"{next(iter(files))}.json" in str(error.value)


@pytest.mark.parametrize("rows", [SIZE, SIZE + 1, 639, 640])
def test_rows_without_a_token_pad_the_embedding(tmp_path: Path, rows: int) -> None:
    assert find_tokenizer(put(tmp_path), None, rows).tokenizer.num_ids == SIZE


def test_a_search_takes_only_tokenizers_that_fit_exactly(tmp_path: Path) -> None:
    beside, source = tmp_path / "beside", tmp_path / "source"
    for folder in (beside, source):
        folder.mkdir()
    put(beside)
    with pytest.raises(OpenELMError, match="No tokenizer was found"):
        find_tokenizer(source, None, SIZE + 1)
    assert find_tokenizer(source, str(beside), SIZE + 1)
    assert find_tokenizer(source, None, SIZE)
