"""Finding, verifying and writing the tokenizer of a model."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, connect, serve
from sentencepieces import LLAMA, SIZE, edited, pieces_of, read_llama, train

from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage import tokenizer_finder
from mlx_openelm.storage.tokenizer_finder import (
    LLAMA_VECTORS,
    PROBES,
    find_tokenizer,
    read_tokenizer,
    verify_tokenizer,
    write_tokenizer,
)
from mlx_openelm.text import tokenizer_json
from mlx_openelm.text.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache; the Hub itself is unreachable."""
    unreachable = Hub(endpoint="http://127.0.0.1:9")
    return connect(unreachable, tmp_path / "hugging-face", monkeypatch)


@pytest.fixture
def hub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    with serve(hub):
        connect(hub, cache.parent, monkeypatch)
        yield hub


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model folder without a tokenizer and without siblings."""
    folder = tmp_path / "models" / "source"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train()


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return read_llama()


@pytest.fixture(scope="module", params=["small", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by `write_tokenizer`."""
    folder = tmp_path_factory.mktemp("written")
    write_tokenizer(tokenizer, folder)
    return folder


# Finding -------------------------------------------------------------------------


def test_a_tokenizer_in_the_folder_of_the_source_is_found(
    small: Tokenizer, tmp_path: Path
) -> None:
    write_tokenizer(small, tmp_path)
    for source in (tmp_path, tmp_path / "openelm.pt"):
        result = find_tokenizer(source, None, SIZE)
        assert result.path == tmp_path / "tokenizer.model"
        assert result.tokenizer.model_proto == small.model_proto
    (tmp_path / "tokenizer.model").unlink()
    assert find_tokenizer(tmp_path, None, SIZE).path == tmp_path / "tokenizer.json"


@pytest.mark.parametrize("name", ["", "tokenizer.model", "tokenizer.json"])
def test_a_given_tokenizer_overrides_that_of_the_source(
    small: Tokenizer, tmp_path: Path, name: str
) -> None:
    write_tokenizer(train(vocab_size=500), tmp_path)
    given = tmp_path / "given"
    given.mkdir()
    write_tokenizer(small, given)
    result = find_tokenizer(tmp_path, str(given / name), SIZE)
    assert result.path.parent == given
    assert result.tokenizer.vocab_size == SIZE


def test_the_error_for_a_missing_tokenizer_has_the_option_to_use(source: Path) -> None:
    for path in (source, source / "openelm.pt"):
        for num_rows in (32000, 300):
            with pytest.raises(OpenELMError) as error:
                find_tokenizer(path, None, num_rows)
            for part in (str(path), "NousResearch/Llama-2-7b-hf", "`tokenizer` none"):
                assert part in str(error.value)
            used_hub = "the request to the Hub failed" in str(error.value)
            assert used_hub == (num_rows == 32000)  # others are not on the Hub


def test_a_wrong_tokenizer_is_reported_by_its_file(
    small: Tokenizer, tmp_path: Path
) -> None:
    write_tokenizer(small, tmp_path)
    with pytest.raises(OpenELMError, match=f"tokenizer.model: .*{SIZE} pieces"):
        find_tokenizer(tmp_path, None, 32000)


@pytest.mark.parametrize("name", ["no.model", "a/b/c", "./x", "/x/y", "a/b.model"])
def test_a_missing_path_is_not_searched_for_on_the_hub(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_finder, "download", None)
    with pytest.raises(OpenELMError, match="no file or folder"):
        find_tokenizer(tmp_path, name, 32000)


def test_a_given_folder_without_a_tokenizer_is_reported(tmp_path: Path) -> None:
    with pytest.raises(OpenELMError, match="holds neither"):
        find_tokenizer(tmp_path, str(tmp_path), 32000)


@pytest.mark.parametrize("offline", [True, False])
def test_a_given_repository_is_downloaded_once(
    small: Tokenizer, source: Path, hub: Hub, offline: bool
) -> None:
    more = {"config.json": b"{}", "model.safetensors": b"not needed"}
    hub.add("org/tokenizer", {"tokenizer.model": small.model_proto} | more)
    if offline:
        with pytest.raises(OpenELMError, match="cache has no tokenizer of that name"):
            find_tokenizer(source, "org/tokenizer", SIZE, offline=True)
        assert not hub.requests
    result = find_tokenizer(source, "org/tokenizer", SIZE)
    assert result.tokenizer.model_proto == small.model_proto
    assert hub.sent == {"tokenizer.model": len(small.model_proto)}
    hub.down = True
    again = find_tokenizer(source, "org/tokenizer", SIZE, offline=offline)
    assert again.path == result.path


def test_a_repository_without_a_tokenizer_is_reported(source: Path, hub: Hub) -> None:
    hub.add("org/model", {"config.json": b"{}", "model.safetensors": b""})
    with pytest.raises(OpenELMError, match="org/model has no tokenizer"):
        find_tokenizer(source, "org/model", SIZE)


# Searching -----------------------------------------------------------------------


def put(folder: Path, tokenizer: Tokenizer | bytes) -> Path:
    folder.mkdir(parents=True)
    content = tokenizer if isinstance(tokenizer, bytes) else tokenizer.model_proto
    (folder / "tokenizer.model").write_bytes(content)
    return folder / "tokenizer.model"


def put_into_cache(cache: Path, repo: str, tokenizer: Tokenizer | bytes) -> Path:
    folder = f"models--{repo.replace('/', '--')}/snapshots/{'0123456789' * 4}"
    return put(cache / folder, tokenizer)


@pytest.fixture(scope="module")
def mistral(llama: Tokenizer) -> bytes:
    """A file with Llama's size and special ids, and its pieces in another order."""
    fake = pieces_of(llama.model_proto)
    for i in range(300, 31000, 2):
        one, other = fake.pieces[i], fake.pieces[i + 1]
        one.piece, other.piece = other.piece, one.piece
    content: bytes = fake.SerializeToString()
    assert len(content) == len(llama.model_proto) == LLAMA.stat().st_size
    return content


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("rows", [32000, 32128])
def test_the_search_covers_nearby_folders_then_the_cache_then_the_hub(
    llama: Tokenizer, source: Path, cache: Path, hub: Hub, rows: int, offline: bool
) -> None:
    name = "NousResearch/Llama-2-7b-hf"
    hub.add(name, {"tokenizer.model": llama.model_proto, "config.json": b"{}"})
    places = {
        "source": source,
        "inside": put(source / "inside", llama),
        "beside": put(source.parent / "beside", llama),
        name: put_into_cache(cache, name, llama),
        "mlx-community/OpenELM-3B": put_into_cache(
            cache, "mlx-community/OpenELM-3B", llama
        ),
        "a/llama": put_into_cache(cache, "a/llama", llama),
        "meta-llama/Llama-2-7b": put_into_cache(cache, "meta-llama/Llama-2-7b", llama),
    }
    (source / "tokenizer.model").write_bytes(llama.model_proto)
    places["source"] = source / "tokenizer.model"
    for where, file in places.items():
        result = find_tokenizer(source, None, rows, offline=offline)
        assert result.path == file
        assert result.tokenizer.model_proto == llama.model_proto
        if where == "source":
            assert result.notes == ()
        else:
            assert f"There is no tokenizer in {source}." in result.notes
            assert str(file) in result.notes[-1]
            assert "gives Llama's ids for every probe" in result.notes[-1]
            assert "/" not in where or f"{where} in the Hub cache" in result.notes[-1]
        assert not hub.requests
        file.unlink()
        if "snapshots" in file.parts:
            shutil.rmtree(file.parents[2])
    if offline:
        with pytest.raises(OpenELMError, match="Offline, so NousResearch"):
            find_tokenizer(source, None, rows, offline=True)
        assert not hub.requests
        return
    result = find_tokenizer(source, None, rows)
    assert f"downloaded from {name}" in result.notes[-1]
    assert result.tokenizer.model_proto == llama.model_proto
    assert hub.sent == {"tokenizer.model": len(llama.model_proto)}


def test_tokenizers_that_resemble_llamas_are_skipped_everywhere(
    llama: Tokenizer, mistral: bytes, source: Path, cache: Path, hub: Hub
) -> None:
    wrong = [
        put(source.parent / "mistral", mistral),
        put_into_cache(cache, "NousResearch/Llama-2-7b-hf", mistral),
        put_into_cache(cache, "mistralai/Mistral-7B-v0.1", mistral),
        put(source.parent / "invalid", b"invalid"),
        put(source.parent / "small", train()),
    ]
    right = put_into_cache(cache, "meta-llama/Llama-2-7b", llama)
    result = find_tokenizer(source, None, 32128)
    assert result.path == right
    notes = "\n".join(result.notes)
    for file in (wrong[0], wrong[1], wrong[3], wrong[4]):  # [2] comes after `right`
        assert f"Skipped {file}: " in notes
    assert notes.count("has 32000 pieces but is not Llama's") == 2
    shutil.rmtree(right.parents[2])
    hub.add("NousResearch/Llama-2-7b-hf", {"tokenizer.model": mistral})
    with pytest.raises(OpenELMError, match="is not Llama's"):
        find_tokenizer(source, None, 32128)


def test_a_tokenizer_in_the_folder_of_the_source_must_fit(
    llama: Tokenizer, mistral: bytes, source: Path
) -> None:
    put(source.parent / "beside", llama)
    (source / "tokenizer.model").write_bytes(mistral)
    with pytest.raises(OpenELMError, match=r"source/tokenizer.model: .* is not Llama"):
        find_tokenizer(source, None, 32000)


def test_a_tokenizer_of_another_vocabulary_is_searched_for_only_nearby(
    small: Tokenizer, source: Path, cache: Path, hub: Hub
) -> None:
    put_into_cache(cache, "NousResearch/Llama-2-7b-hf", small)
    with pytest.raises(OpenELMError, match="No tokenizer was found"):
        find_tokenizer(source, None, SIZE)
    put(source.parent / "copy", small)
    write_tokenizer(small, put(source.parent / "same", small).parent)
    (source.parent / "same" / "tokenizer.model").unlink()  # its tokenizer.json stays
    result = find_tokenizer(source, None, SIZE)
    assert result.path == source.parent / "copy" / "tokenizer.model"
    assert f"it fits {SIZE} rows; if the model has another" in result.notes[-1]
    assert not hub.requests


def test_two_different_fitting_tokenizers_are_an_error(
    small: Tokenizer, source: Path
) -> None:
    put(source.parent / "one", small)
    put(source.parent / "two", train(split_digits=False))
    with pytest.raises(OpenELMError, match=r"one.*two.* both fit the model and differ"):
        find_tokenizer(source, None, SIZE)


def test_the_search_is_limited(
    small: Tokenizer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(source.parent / "large", small)
    monkeypatch.setattr(tokenizer_finder, "MOST_BYTES", 1000)
    with pytest.raises(OpenELMError, match=r"large/tokenizer.model is too large"):
        find_tokenizer(source, None, SIZE)
    monkeypatch.setattr(tokenizer_finder, "MOST_BYTES", 20_000_000)
    put(source.parent / "another", train(vocab_size=500))
    monkeypatch.setattr(tokenizer_finder, "MOST_TOKENIZERS", 1)
    with pytest.raises(OpenELMError, match=r"another/tokenizer.model: .* 500 pieces"):
        find_tokenizer(source, None, SIZE)


# Reading -------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_the_error_for_a_damaged_file_names_it(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OpenELMError, match=name):
        read_tokenizer(tmp_path)


def test_a_tokenizer_json_that_gives_other_ids_is_noticed(
    small: Tokenizer, tmp_path: Path
) -> None:
    # Its pieces and merges are ours, but dropout skips all merges.
    file = edited(small, tmp_path, lambda file: file["model"].update(dropout=1.0))
    with pytest.raises(OpenELMError, match="differs from SentencePiece"):
        read_tokenizer(file)


# Verifying -----------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [SIZE, 640])
def test_rows_that_fit_are_accepted(small: Tokenizer, num_rows: int) -> None:
    verify_tokenizer(small, num_rows)


@pytest.mark.parametrize("num_rows", [0, 512, SIZE - 1, 641, 768, 32000])
def test_rows_that_do_not_fit_are_reported(small: Tokenizer, num_rows: int) -> None:
    with pytest.raises(OpenELMError, match=rf"{SIZE} pieces.* {num_rows} rows"):
        verify_tokenizer(small, num_rows)


def test_llama_fits_its_rows_and_padding(llama: Tokenizer) -> None:
    for num_rows in (32000, 32001, 32064, 32127, 32128):
        verify_tokenizer(llama, num_rows)
    for num_rows in (31999, 32129, 32256):
        with pytest.raises(OpenELMError, match="32000 pieces"):
            verify_tokenizer(llama, num_rows)


def test_a_full_multiple_of_128_is_padded_by_another_128() -> None:
    # The padding id needs a row of its own.
    verify_tokenizer(train(vocab_size=512), 640)


@pytest.mark.parametrize(
    ("options", "message"),
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
def test_a_tokenizer_that_behaves_unlike_llamas_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OpenELMError, match=message):
        verify_tokenizer(train(**options), SIZE)


def test_another_vocabulary_of_llamas_size_is_refused(small: Tokenizer) -> None:
    fake = pieces_of(small.model_proto)
    for i in range(32000 - SIZE):
        fake.pieces.add(piece=chr(0x10000 + i), score=-1e6 - i)
    similar = Tokenizer(fake.SerializeToString())
    assert similar.vocab_size == 32000
    with pytest.raises(OpenELMError, match="32000 pieces but is not Llama's"):
        verify_tokenizer(similar, 32000)


def test_llamas_pieces_in_another_order_are_refused(llama: Tokenizer) -> None:
    fake = pieces_of(llama.model_proto)
    shuffled = list(fake.pieces)[259:]
    random.Random(1).shuffle(shuffled)
    del fake.pieces[259:]
    fake.pieces.extend(shuffled)
    with pytest.raises(OpenELMError, match="not Llama's"):
        verify_tokenizer(Tokenizer(fake.SerializeToString()), 32128)


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


def test_merges_in_another_order_are_refused_for_llama(
    llama: Tokenizer, tmp_path: Path
) -> None:
    # As transformers 5 converts a tokenizer.model: merges in the order of ids.
    def by_id(file: dict[str, Any]) -> None:
        vocab = file["model"]["vocab"]
        file["model"]["merges"].sort(key=lambda pair: vocab["".join(pair)])

    file = edited(llama, tmp_path, by_id)
    with pytest.raises(OpenELMError, match="not Llama's"):
        verify_tokenizer(read_tokenizer(file), 32000)


# Writing -------------------------------------------------------------------------


def test_tokenizer_model_is_written_byte_for_byte(
    tokenizer: Tokenizer, folder: Path
) -> None:
    assert (folder / "tokenizer.model").read_bytes() == tokenizer.model_proto


def test_nothing_is_written_if_tokenizer_json_cannot_express_it(
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


def test_the_error_for_a_missing_folder_names_it(
    small: Tokenizer, tmp_path: Path
) -> None:
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
def test_a_tokenizer_saved_by_transformers_is_read(
    llama: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in mlx_lm.convert: a Llama repository's tokenizer.json, saved again.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import LlamaTokenizer

    write_tokenizer(llama, tmp_path)
    LlamaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "tokenizer.model").exists()
    result = find_tokenizer(tmp_path / "saved", None, 32000)
    assert result.path == tmp_path / "saved" / "tokenizer.json"
    for text in PROBES:
        assert result.tokenizer.encode(text) == llama.encode(text)
