"""A SentencePiece model and its tokenizer.json give the same ids."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from places import SHARED
from sentencepieces import SIZE, Edit, edited, pieces_of, read_llama, train
from tokenizers import Tokenizer as HuggingFaceTokenizer

from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.tokenizer_finder import (
    PROBES,
    read_tokenizer,
    verify_tokenizer,
)
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.text.tokenizer_json import describe, rebuild

STORIES = SHARED / "data" / "stories" / "text"


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train()


@pytest.fixture(scope="module", params=[train, read_llama], ids=["small", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    loaded: Tokenizer = request.param()
    return loaded


@pytest.fixture(scope="module")
def described(tokenizer: Tokenizer) -> str:
    return json.dumps(describe(tokenizer))


@pytest.fixture(scope="module")
def fast(described: str) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.from_str(described)


@pytest.fixture(scope="module")
def rebuilt(described: str) -> Tokenizer:
    return rebuild(json.loads(described))


_snippets = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")),
    st.text("ab the\n", max_size=30),
    st.integers(1, 40).map(" ".__mul__),
    st.sampled_from(["the", "aba", "bab", "日本", " string", "12", "\t", "<", ">"]),
)
texts = (
    st.lists(_snippets, max_size=8)
    .map("".join)
    .filter(lambda text: not any(x in text for x in ("<s>", "</s>", "<unk>")))
)


# One tokenizer in both formats ---------------------------------------------------


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example("")
@example(" ")
@example("  x")
@given(texts)
def test_any_text_has_the_same_ids_in_both_files(
    tokenizer: Tokenizer, fast: HuggingFaceTokenizer, rebuilt: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert fast.encode(text).ids == ids
    assert rebuilt.encode(text) == ids
    assert fast.decode(ids) == tokenizer.decode(ids) == rebuilt.decode(ids) == text


def test_spaces_in_any_number_have_the_same_ids(
    tokenizer: Tokenizer, fast: HuggingFaceTokenizer, rebuilt: Tokenizer
) -> None:
    # Llama's space pieces all have the same score, so the order of ties decides.
    for before in ("", "x", ".", "\n", "日"):
        for after in ("", "x", "."):
            for n in range(70):
                text = before + " " * n + after
                ids = tokenizer.encode(text)
                assert fast.encode(text).ids == ids == rebuilt.encode(text), repr(text)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs the stories at {STORIES}")
def test_stories_have_the_same_ids(
    tokenizer: Tokenizer, fast: HuggingFaceTokenizer, rebuilt: Tokenizer
) -> None:
    for file in sorted(STORIES.glob("*.txt"))[:40:8]:
        text = file.read_text(encoding="utf-8")[:100_000]
        ids = tokenizer.encode(text)
        assert fast.encode(text).ids == ids, file.name
        assert rebuilt.encode(text) == ids, file.name


def test_rebuilt_model_has_the_settings_of_the_original(
    tokenizer: Tokenizer, rebuilt: Tokenizer
) -> None:
    ours, theirs = pieces_of(rebuilt.model_proto), pieces_of(tokenizer.model_proto)
    assert [(p.piece, p.type) for p in ours.pieces] == [
        (p.piece, p.type) for p in theirs.pieces
    ]
    for spec, names in {
        "trainer_spec": "model_type vocab_size byte_fallback "
        "unk_id bos_id eos_id pad_id unk_piece bos_piece eos_piece "
        "treat_whitespace_as_suffix",
        "normalizer_spec": "precompiled_charsmap add_dummy_prefix "
        "remove_extra_whitespaces escape_whitespaces",
    }.items():
        for name in names.split():
            values = [getattr(getattr(m, spec), name) for m in (ours, theirs)]
            assert values[0] == values[1], name


def test_literal_special_tokens_are_text_in_a_rebuilt_model(
    tokenizer: Tokenizer, rebuilt: Tokenizer
) -> None:
    for text in ("<s>", "a</s>b", "<unk><0x0A>"):
        assert rebuilt.encode(text) == tokenizer.encode(text)


# SentencePiece -> tokenizer.json -------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram", "vocab_size": 380}, "not BPE"),
        ({"byte_fallback": False, "vocab_size": 300}, "byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text .nmt_nfkc"),
        ({"add_dummy_prefix": False}, "no dummy space"),
        ({"remove_extra_whitespaces": True}, "extra white space"),
        ({"treat_whitespace_as_suffix": True}, "after words"),
        ({"user_defined_symbols": ["<tag>"]}, "<tag>"),
    ],
)
def test_what_tokenizer_json_cannot_express_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OpenELMError, match=message):
        describe(train(**options))


# tokenizer.json -> SentencePiece -------------------------------------------------


def _join_merges(file: dict[str, Any]) -> None:
    file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]


def _use_metaspace(file: dict[str, Any]) -> None:
    file["normalizer"] = None
    file["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": "first",
        "split": False,
    }


def _add_token(file: dict[str, Any], text: str) -> None:
    file["added_tokens"].append({"id": SIZE, "content": text, "special": True})


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(_join_merges, id="merges as in older files"),
        pytest.param(_use_metaspace, id="spaces as in transformers 5"),
        pytest.param(lambda f: _add_token(f, "[PAD]"), id="a padding token at the end"),
    ],
)
def test_other_forms_of_tokenizer_json_are_read(
    small: Tokenizer, tmp_path: Path, edit: Edit
) -> None:
    tokenizer = read_tokenizer(edited(small, tmp_path, edit), template="instruct")
    assert tokenizer.template == "instruct"
    verify_tokenizer(tokenizer, SIZE)
    for text in PROBES:
        assert tokenizer.encode(text) == small.encode(text)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f["model"].update(type="Unigram"), "not BPE"),
        (lambda f: f["model"].update(byte_fallback=False), "byte fallback"),
        (lambda f: f["model"]["vocab"].update(x=SIZE + 5), "ids are not 0 to"),
        (lambda f: f.update(normalizer={"type": "NFC"}), "NFC"),
        (lambda f: f.update(normalizer=None), "one space in front"),
        (lambda f: f.update(pre_tokenizer={"type": "ByteLevel"}), "ByteLevel"),
        (lambda f: _add_token(f, "<|im_start|>"), "im_start"),
        (lambda f: f["added_tokens"].pop(), "added tokens"),
        (lambda f: f["model"]["merges"].pop(), "merges"),
        (lambda f: f["model"]["merges"].append(["x"]), "structure|Cannot read"),
        (lambda f: f["model"].pop("vocab"), "structure"),
        (lambda f: f["model"].update(vocab=[["a", 0.0]]), "structure"),
        (dict.clear, "structure"),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_refused(
    small: Tokenizer, tmp_path: Path, edit: Edit, message: str
) -> None:
    file = edited(small, tmp_path, edit)
    with pytest.raises(OpenELMError, match=message) as error:
        read_tokenizer(file)
    assert str(file) in str(error.value)
