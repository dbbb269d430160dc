"""The token cache yields the batches of the text, also after damage to its files."""

import dataclasses
import gzip
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from models import TEXT, small_tokenizer

pytest.importorskip("ftfy", reason="needs the torch extra")

from converters.pretraining import token_cache as module
from converters.pretraining.cleaning import Rules, make_pieces
from converters.pretraining.documents import Damage, DamagedFileError, Unit
from converters.pretraining.loader import join_states, open_loader
from converters.pretraining.recipe import DataRecipe, PretrainRecipe
from converters.pretraining.streams import CUT
from converters.pretraining.token_cache import CachedUnit, CorpusUnit
from mlx_openelm.errors import OpenELMError

tokenizer = small_tokenizer()
RULES = Rules(words_per_piece=30, min_characters=20, min_tokens=40, length=64)
TEXTS = [TEXT[start : start + 40 * start] for start in range(1, 30)] + ["", "short"]


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "a.jsonl")


def make_source(path, texts=TEXTS, **changes):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = CorpusUnit(Unit(str(path)), "text", None, RULES, tokenizer)
    return dataclasses.replace(source, **changes)


def flat(pieces):
    return [(p.tokens.tolist(), p.dropped, p.num_cut) for p in pieces]


def expected(source):
    """Return the pieces of the text, without the cache."""
    return [
        flat(make_pieces(text, source.tokenizer, source.rules))
        for text in source.read()
        if not isinstance(text, Damage)
    ]


def read_all(cached):
    return [flat(document.pieces()) for document in cached.read()]


def record_writes(monkeypatch):
    writes, write = [], module._write

    def counted(path, source):
        writes.append(path)
        write(path, source)

    monkeypatch.setattr(module, "_write", counted)
    return writes


def test_the_pieces_are_those_of_the_text(tmp_path, source, monkeypatch):
    writes = record_writes(monkeypatch)
    folder = str(tmp_path / "cache" / "deep")
    texts = expected(source)
    reasons = {reason for pieces in texts for _, reason, _ in pieces}
    assert reasons == {"", "too few characters", "too few tokens"}
    assert any(num_cut for pieces in texts for _, _, num_cut in pieces)
    for _ in range(2):
        cached = CachedUnit(folder, source)
        assert read_all(cached) == texts
        assert [flat(d.pieces()) for d in cached.read(start=20)] == texts[20:]
        late = [flat(d.pieces(start=1)) for d in cached.read()]
        assert late == [pieces[1:] for pieces in texts]
    assert len(writes) == 1
    (path,) = writes
    assert path.stat().st_size < 3 * sum(len(t) for p in texts for t, _, _ in p) + 9999
    assert not list(path.parent.glob(".*"))


def test_a_vocabulary_over_65536_has_wider_tokens(tmp_path, source, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "vocab_size", 1 << 17)
    pieces = make_pieces

    def shifted(*arguments, **options):
        for piece in pieces(*arguments, **options):
            yield dataclasses.replace(piece, tokens=piece.tokens + (1 << 16))

    monkeypatch.setattr(module, "make_pieces", shifted)
    cached = CachedUnit(str(tmp_path / "cache"), source)
    tokens = [ids for document in read_all(cached) for ids, _, _ in document]
    wide = [
        [i + (1 << 16) for i in ids]
        for pieces in expected(source)
        for ids, _, _ in pieces
    ]
    assert tokens == wide


def test_everything_that_determines_the_tokens_changes_the_cache_file(
    tmp_path, source, monkeypatch
):
    writes = record_writes(monkeypatch)
    folder = str(tmp_path / "cache")

    def refresh(source):
        assert read_all(CachedUnit(folder, source)) == expected(source)
        assert read_all(CachedUnit(folder, source)) == expected(source)

    refresh(source)
    for name in ("words_per_piece", "min_characters", "min_tokens", "length"):
        number = getattr(RULES, name) - 3
        rules = dataclasses.replace(RULES, **{name: number})
        refresh(dataclasses.replace(source, rules=rules))
    refresh(dataclasses.replace(source, tokenizer=small_tokenizer(320)))
    refresh(make_source(tmp_path / "b.jsonl"))
    assert len(writes) == 7
    os.utime(source.path, (1, 1))
    refresh(source)
    refresh(make_source(tmp_path / "a.jsonl", TEXTS[::-1]))
    refresh(make_source(tmp_path / "a.jsonl", [*TEXTS, "more"]))
    assert len(writes) == 10
    monkeypatch.setattr(module.ftfy, "__version__", "another")  # may repair differently
    refresh(source)
    assert len(writes) == 11
    path = tmp_path / "two.jsonl"
    path.write_text(json.dumps({"text": TEXT, "other": TEXT[9:]}) + "\n")
    for changes in ({}, {"text_key": "other"}, {"document_start": "x"}):
        refresh(dataclasses.replace(source, unit=Unit(str(path)), **changes))
    assert len(writes) == 14
    for unit in (Unit(source.path, 0, 2), Unit(source.path, 1, 2)):
        refresh(dataclasses.replace(source, unit=unit))
    assert len(writes) == 16


def test_a_temporary_read_error_is_not_cached_as_damage(tmp_path, source, monkeypatch):
    failure = Damage("no", is_rest=True, is_access=True)
    folder = str(tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(module, "read_documents", lambda *a, **k: iter([failure]))
        assert list(CachedUnit(folder, source).read()) == [failure]
    assert read_all(CachedUnit(folder, source)) == expected(source)


def test_a_damaged_cache_file_is_detected_and_replaced(tmp_path, source, monkeypatch):
    writes = record_writes(monkeypatch)
    folder = tmp_path / "cache"
    texts = expected(source)
    assert read_all(CachedUnit(str(folder), source)) == texts
    (path,) = folder.glob("*.tokens")
    whole = path.read_bytes()
    for position in (*range(0, len(whole), len(whole) // 40), len(whole) - 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        writes.clear()
        assert read_all(CachedUnit(str(folder), source)) == texts
        assert path.read_bytes() == whole
        assert len(writes) == 1
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert read_all(CachedUnit(str(folder), source)) == texts
    path.write_bytes(whole + b"\0")
    assert read_all(CachedUnit(str(folder), source)) == texts
    assert path.read_bytes() == whole


@pytest.mark.parametrize("start", [0, 3, 5, 6, 20])
def test_damages_are_items_of_the_cached_unit(tmp_path, source, start):
    path = Path(source.path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], "{", "7", *lines[4:], "{"]))
    items = list(source.read(start))
    for _ in range(2):  # read, and from the cache
        cached = list(CachedUnit(str(tmp_path / "cache"), source).read(start))
        for item, plain in zip(cached, items, strict=True):
            if isinstance(plain, Damage):
                assert item == plain
            else:
                pieces = make_pieces(plain, tokenizer, RULES)
                assert flat(item.pieces()) == flat(pieces)
                assert len(item) == len(plain)
    assert "Record 5 of" in next(i for i in source.read(4)).describe(source.path)


def test_an_unreadable_file_is_tried_again(tmp_path, source):
    hidden = tmp_path / "hidden"
    os.rename(source.path, hidden)
    (damage,) = CachedUnit(str(tmp_path / "cache"), source).read()
    with pytest.raises(DamagedFileError, match=r"a\.jsonl is damaged .*No such file"):
        damage.drop(source.path, "stop")
    os.rename(hidden, source.path)
    assert read_all(CachedUnit(str(tmp_path / "cache"), source)) == expected(source)


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, source):
    (tmp_path / "file").touch()
    with pytest.raises(OpenELMError, match=r"another data\.cache"):
        CachedUnit(str(tmp_path / "file"), source)


def test_an_interrupted_run_leaves_no_incomplete_file(tmp_path, source, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "make_pieces", stop)
        with pytest.raises(KeyboardInterrupt):
            CachedUnit(str(tmp_path / "cache"), source)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]
    assert read_all(CachedUnit(str(tmp_path / "cache"), source)) == expected(source)


def fill(path, folder, writes, barrier):
    source = CorpusUnit(Unit(path), "text", None, RULES, tokenizer)
    write = module._write

    def counted(*arguments):
        writes.put(1)
        time.sleep(0.5)  # so that the others arrive during it
        write(*arguments)

    module._write = counted
    barrier.wait()
    assert read_all(CachedUnit(folder, source)) == expected(source)


def test_only_one_of_several_processes_writes_the_file(tmp_path, source):
    context = multiprocessing.get_context("spawn")
    writes = context.SimpleQueue()
    barrier = context.Barrier(3)
    arguments = (source.path, str(tmp_path / "cache"), writes, barrier)
    processes = [context.Process(target=fill, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    writes.get()
    assert writes.empty()


@pytest.mark.parametrize("num_files", [6, 2])
def test_batches_states_and_counts_are_the_same_with_a_cache(tmp_path, num_files):
    for i in range(num_files):
        make_source(tmp_path / f"{i}.jsonl", [f"{i} {text}" for text in TEXTS[4:12]])
    cut = tmp_path / "cut.jsonl.gz"
    line = json.dumps({"text": TEXT}) + "\n"
    cut.write_bytes(gzip.compress((line * 9).encode())[:-20])
    data = DataRecipe(
        train=(str(tmp_path / "*.jsonl*"),),
        words_per_piece=30,
        min_characters=20,
        min_tokens=40,
        shuffle_block=5,
        on_damage="skip",
    )
    plain = PretrainRecipe(data=data, batch_size=4, seed=1)
    data = dataclasses.replace(data, cache=str(tmp_path / "cache"))
    kept = dataclasses.replace(plain, data=data)
    one, other = (open_loader(recipe, tokenizer, 64) for recipe in (plain, kept))
    for _ in range(90):
        a, b = one.next_batch(), other.next_batch()
        assert (a.inputs == b.inputs).all()
        assert (a.targets == b.targets).all()
        assert one.state() == other.state()
    assert one.dropped == other.dropped
    assert {f"rest of {cut}, damaged", "too few tokens", CUT} <= set(one.dropped)
    resumed = open_loader(kept, tokenizer, 64)  # from a checkpoint without a cache
    resumed.restore(join_states([one.state()]))
    for _ in range(9):
        assert (resumed.next_batch().inputs == one.next_batch().inputs).all()
