"""A tokenizer is found, proved, and written into files that agree."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer_json import SIZE, edited, pieces_of, read_llama, train

from mlx_openelm import tokenizer_finder, tokenizer_json
from mlx_openelm.errors import OpenELMError
from mlx_openelm.tokenizer import Tokenizer
from mlx_openelm.tokenizer_finder import (
    LLAMA_VECTORS,
    PROBES,
    find_tokenizer,
    prove_tokenizer,
    read_tokenizer,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train()


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return read_llama()


@pytest.fixture(scope="module", params=["small", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `write_tokenizer` has filled."""
    folder = tmp_path_factory.mktemp("written")
    write_tokenizer(tokenizer, folder)
    return folder


# Finding -------------------------------------------------------------------------


def test_a_tokenizer_beside_a_folder_or_a_file_is_found(
    small: Tokenizer, tmp_path: Path
) -> None:
    write_tokenizer(small, tmp_path)
    for source in (tmp_path, tmp_path / "openelm.pt"):
        found = find_tokenizer(source, None, SIZE)
        assert found.path == tmp_path / "tokenizer.model"
        assert found.tokenizer.model_proto == small.model_proto
    (tmp_path / "tokenizer.model").unlink()
    assert find_tokenizer(tmp_path, None, SIZE).path == tmp_path / "tokenizer.json"


@pytest.mark.parametrize("name", ["", "tokenizer.model", "tokenizer.json"])
def test_a_given_tokenizer_goes_before_one_beside_the_source(
    small: Tokenizer, tmp_path: Path, name: str
) -> None:
    write_tokenizer(train(vocab_size=500), tmp_path)
    given_one = tmp_path / "given"
    given_one.mkdir()
    write_tokenizer(small, given_one)
    found = find_tokenizer(tmp_path, str(given_one / name), SIZE)
    assert found.path.parent == given_one
    assert found.tokenizer.vocab_size == SIZE


def test_no_tokenizer_says_where_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for source in (tmp_path, tmp_path / "openelm.pt"):
        with pytest.raises(OpenELMError) as refusal:
            find_tokenizer(source, None, 32000)
        for part in (str(source), "NousResearch/Llama-2-7b-hf", "--tokenizer none"):
            assert part in str(refusal.value)


def test_a_wrong_tokenizer_is_named_by_its_file(
    small: Tokenizer, tmp_path: Path
) -> None:
    write_tokenizer(small, tmp_path)
    with pytest.raises(OpenELMError, match=f"tokenizer.model: .*{SIZE} pieces"):
        find_tokenizer(tmp_path, None, 32000)


@pytest.mark.parametrize("name", ["no.model", "a/b/c", "./x", "/x/y", "a/b.model"])
def test_a_given_path_that_is_not_there_is_not_sought_on_the_hub(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_finder, "download", None)
    with pytest.raises(OpenELMError, match="no file or folder"):
        find_tokenizer(tmp_path, name, 32000)


def test_a_given_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(OpenELMError, match="holds neither"):
        find_tokenizer(tmp_path, str(tmp_path), 32000)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("offline", [True, False])
def test_the_hub_is_asked_only_for_what_is_not_cached(
    small: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cached: bool,
    offline: bool,
) -> None:
    write_tokenizer(small, tmp_path)
    asked = []

    def snapshot_download(
        repo: str, *, allow_patterns: list[str], local_files_only: bool, **_: object
    ) -> str:
        assert repo == "someone/tokenizer"
        assert set(allow_patterns) == {
            *("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
        }
        asked.append(local_files_only)
        if local_files_only and not cached:
            raise OSError("not cached")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    source = tmp_path / "x.pt"
    if offline and not cached:
        with pytest.raises(OpenELMError, match="someone/tokenizer"):
            find_tokenizer(source, "someone/tokenizer", SIZE, offline=offline)
    else:
        found = find_tokenizer(source, "someone/tokenizer", SIZE, offline=offline)
        assert found.path == tmp_path / "tokenizer.model"
    assert asked.count(False) == (not cached and not offline)


def test_a_repository_cached_without_its_tokenizer_is_asked_for_it(
    small: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    write_tokenizer(small, tmp_path / "full")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *_, local_files_only, **__: str(
            tmp_path / ("empty" if local_files_only else "full")
        ),
    )
    found = find_tokenizer(tmp_path, "someone/tokenizer", SIZE)
    assert found.path.parent.name == "full"
    with pytest.raises(OpenELMError, match="someone/tokenizer holds neither"):
        find_tokenizer(tmp_path, "someone/tokenizer", SIZE, offline=True)


# Reading -------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_damaged_file_is_a_named_error(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OpenELMError, match=name):
        read_tokenizer(tmp_path)


def test_a_tokenizer_json_that_gives_other_ids_is_noticed(
    small: Tokenizer, tmp_path: Path
) -> None:
    # Its pieces and merges are ours, but all merges are skipped when it is used.
    file = edited(small, tmp_path, lambda found: found["model"].update(dropout=1.0))
    with pytest.raises(OpenELMError, match="differs from SentencePiece"):
        read_tokenizer(file)


# Proving -------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [SIZE, 640])
def test_rows_that_fit_are_accepted(small: Tokenizer, num_rows: int) -> None:
    prove_tokenizer(small, num_rows)


@pytest.mark.parametrize("num_rows", [0, 512, SIZE - 1, SIZE + 1, 639, 641, 768, 32000])
def test_rows_that_do_not_fit_are_named(small: Tokenizer, num_rows: int) -> None:
    with pytest.raises(OpenELMError, match=rf"{SIZE} pieces.* {num_rows} rows"):
        prove_tokenizer(small, num_rows)


def test_llama_fits_its_rows_and_corenets_padding(llama: Tokenizer) -> None:
    prove_tokenizer(llama, 32000)
    prove_tokenizer(llama, 32128)
    for num_rows in (31999, 32001, 32127, 32129, 32256):
        with pytest.raises(OpenELMError, match="32000 pieces"):
            prove_tokenizer(llama, num_rows)


def test_a_full_multiple_of_128_is_padded_by_another_128() -> None:
    prove_tokenizer(train(vocab_size=512), 640)  # the padding id takes a row of its own


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pad_id": 0, "unk_id": 3}, "unknown, BOS and EOS"),
        ({"bos_id": 2, "eos_id": 1}, "unknown, BOS and EOS"),
        ({"byte_fallback": False, "vocab_size": 300}, "byte pieces"),
        ({"add_dummy_prefix": False}, "dummy space"),
        ({"treat_whitespace_as_suffix": True}, "dummy space"),
        ({"remove_extra_whitespaces": True}, "loses text"),
        ({"normalization_rule_name": "nmt_nfkc"}, "loses text"),
    ],
)
def test_a_tokenizer_without_llamas_manners_is_refused(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(OpenELMError, match=said):
        prove_tokenizer(train(**options), SIZE)


def test_another_vocabulary_of_llamas_size_is_refused(small: Tokenizer) -> None:
    fake = pieces_of(small.model_proto)
    for i in range(32000 - SIZE):
        fake.pieces.add(piece=chr(0x10000 + i), score=-1e6 - i)
    look_alike = Tokenizer(fake.SerializeToString())
    assert look_alike.vocab_size == 32000
    with pytest.raises(OpenELMError, match="32000 pieces but is not Llama's"):
        prove_tokenizer(look_alike, 32000)


def test_llamas_pieces_in_another_order_are_refused(llama: Tokenizer) -> None:
    fake = pieces_of(llama.model_proto)
    shuffled = list(fake.pieces)[259:]
    random.Random(1).shuffle(shuffled)
    del fake.pieces[259:]
    fake.pieces.extend(shuffled)
    with pytest.raises(OpenELMError, match="not Llama's"):
        prove_tokenizer(Tokenizer(fake.SerializeToString()), 32128)


def test_llamas_published_vectors_hold(llama: Tokenizer) -> None:
    for text, ids in LLAMA_VECTORS.items():
        assert llama.encode(text) == ids
    more = {
        "Once upon a time in a land": "9038 2501 263 931 297 263 2982",
        "<|system|>\n": "529 29989 5205 29989 29958 13",
        "<|assistant|>\n": "529 29989 465 22137 29989 29958 13",
    }
    for text, numbers in more.items():
        assert llama.encode(text) == [1, *map(int, numbers.split())]


def test_merges_that_cut_words_otherwise_do_not_pass_for_llama(
    llama: Tokenizer, tmp_path: Path
) -> None:
    # What transformers 5 makes of a tokenizer.model alone: merges in the order of ids.
    def by_id(found: dict[str, Any]) -> None:
        vocab = found["model"]["vocab"]
        found["model"]["merges"].sort(key=lambda pair: vocab["".join(pair)])

    file = edited(llama, tmp_path, by_id)
    with pytest.raises(OpenELMError, match="not Llama's"):
        prove_tokenizer(read_tokenizer(file), 32000)


# Writing -------------------------------------------------------------------------


def test_tokenizer_model_is_written_byte_for_byte(
    tokenizer: Tokenizer, folder: Path
) -> None:
    assert (folder / "tokenizer.model").read_bytes() == tokenizer.model_proto


def test_nothing_is_written_of_what_tokenizer_json_cannot_express(
    tmp_path: Path,
) -> None:
    with pytest.raises(OpenELMError, match="cannot express"):
        write_tokenizer(train(add_dummy_prefix=False), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_written_file_that_differs_is_noticed(
    small: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges = tokenizer_json._merges
    monkeypatch.setattr(tokenizer_json, "_merges", lambda p: merges(p)[::-1])
    with pytest.raises(OpenELMError, match="differs from SentencePiece"):
        write_tokenizer(small, tmp_path)


def test_a_missing_folder_is_a_named_error(small: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(OpenELMError, match="nowhere"):
        write_tokenizer(small, tmp_path / "nowhere")


@pytest.mark.interop
def test_transformers_and_mlx_lm_give_the_same_ids(
    tokenizer: Tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from mlx_lm.utils import load_tokenizer
    from transformers import AutoTokenizer

    loaders: list[Callable[[Path], Any]] = [
        AutoTokenizer.from_pretrained,
        load_tokenizer,
    ]
    for load in loaders:
        theirs = load(folder)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
        for text in PROBES:
            ids = tokenizer.encode(text)
            assert theirs.encode(text) == ids, repr(text)
            assert theirs.decode(ids, skip_special_tokens=True) == text


@pytest.mark.interop
def test_what_transformers_saves_is_read_back(
    llama: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The way of mlx_lm.convert: a Llama repository's tokenizer.json, saved again.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import LlamaTokenizer

    write_tokenizer(llama, tmp_path)
    LlamaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "tokenizer.model").exists()
    found = find_tokenizer(tmp_path / "saved", None, 32000)
    assert found.path == tmp_path / "saved" / "tokenizer.json"
    for text in PROBES:
        assert found.tokenizer.encode(text) == llama.encode(text)
