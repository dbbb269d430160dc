"""Shares of corpora in the batches, and what is read for them.

The expected shares are computed from the documents, without the reader.
"""

import gzip
import itertools
import json
import signal
from collections import Counter
from dataclasses import replace

import pytest
from models import small_tokenizer

pytest.importorskip("ftfy", reason="needs the torch extra")
pyarrow = pytest.importorskip("pyarrow", reason="needs the torch extra")

from pyarrow import parquet  # noqa: E402

from converters.pretraining import streams  # noqa: E402
from converters.pretraining.cleaning import Rules, make_pieces  # noqa: E402
from converters.pretraining.loader import join_states, open_loader  # noqa: E402
from converters.pretraining.packing import IGNORED  # noqa: E402
from converters.pretraining.recipe import (  # noqa: E402
    CorpusRecipe,
    DataRecipe,
    PretrainRecipe,
)
from converters.pretraining.units import Dealer, plan_reading  # noqa: E402
from mlx_openelm.errors import OpenELMError  # noqa: E402
from mlx_openelm.recipe_loader import load_recipe  # noqa: E402
from mlx_openelm.text import record_files  # noqa: E402

tokenizer = small_tokenizer()
LENGTH = 40
RULES = {"words_per_piece": 20, "min_characters": 10, "min_tokens": 8}
COUNTS = {"books": (8, 3000), "pages": (500, 6), "notes": (120, 31)}  # and words each


def make_texts(name):
    """Documents of very different lengths, whose tokens show the corpus."""
    count, words = COUNTS[name]
    letter = name[0] * 2
    return [" ".join([letter] * (words - i % 3)) for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    """One gzip file of books, two files of pages, one parquet file of notes."""
    lines = {
        name: [json.dumps({"text": text}) + "\n" for text in make_texts(name)]
        for name in COUNTS
    }
    (tmp_path / "books.json.gz").write_bytes(
        gzip.compress("".join(lines["books"]).encode())
    )
    for part in (0, 1):
        (tmp_path / f"pages-{part}.jsonl").write_text("".join(lines["pages"][part::2]))
    table = pyarrow.table({"text": make_texts("notes")})
    parquet.write_table(table, tmp_path / "notes.parquet", row_group_size=10)
    return tmp_path


def make_recipe(folder, shares=(None, None, None), *, batch_size=16, **data):
    files = ("books*", "pages*", "notes*")
    corpora = tuple(
        CorpusRecipe((str(folder / name),), token_share=share)
        for name, share in zip(files, shares, strict=True)
    )
    data = DataRecipe(corpora=corpora, **{**RULES, "shuffle_block": 8, **data})
    return PretrainRecipe(data=data, batch_size=batch_size, seed=5)


def open_recipe(recipe, **options):
    return open_loader(recipe, tokenizer, LENGTH, **options)


def count_tokens(batch):
    """Count the targets of each corpus."""
    counts = Counter()
    for targets in batch.targets:
        kept = targets[targets != IGNORED]
        name = "bpn".index(tokenizer.decode(kept.tolist()).strip()[0])
        counts[list(COUNTS)[name]] += len(kept)
    return counts


def shares_of(counts):
    return {name: count / counts.total() for name, count in counts.items()}


def natural_tokens():
    rules = Rules(length=LENGTH, **RULES)
    counts = Counter()
    for name in COUNTS:
        for text in make_texts(name):
            for piece in make_pieces(text, tokenizer, rules):
                counts[name] += max(0, len(piece.tokens) - 1)
    return counts


@pytest.mark.parametrize("readers", [2, 16])
def test_natural_shares_are_those_of_the_data(folder, readers):
    """Over an epoch, exactly; in a run that ends anywhere, within 2 %."""
    loader = open_recipe(make_recipe(folder, batch_size=readers, readers=readers))
    by_epoch, running = {}, Counter()
    epochs = [0] * readers
    while min(epochs) < 4:
        batch = loader.next_batch()
        epochs = [each["positions"][0][0] for each in loader.state()["streams"]]
        running += count_tokens(batch)
        for row, epoch in enumerate(epochs):
            one = replace(batch, targets=batch.targets[row : row + 1])
            by_epoch.setdefault(epoch, Counter()).update(count_tokens(one))
    expected = natural_tokens()
    for epoch in range(4):
        assert by_epoch[epoch] == expected
    for name, share in shares_of(expected).items():
        assert shares_of(running)[name] == pytest.approx(share, abs=0.02)


def test_natural_shares_are_even_within_an_epoch(folder):
    loader = open_recipe(make_recipe(folder, readers=2))
    expected = shares_of(natural_tokens())
    for _ in range(3):
        counts = sum((count_tokens(loader.next_batch()) for _ in range(40)), Counter())
        for name, share in expected.items():
            assert shares_of(counts)[name] == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((0.038, 0.7, 0.262), (0.038, 0.7, 0.262)),
        ((3, 1, 4), (3 / 8, 1 / 8, 4 / 8)),  # relative to their sum
        ((0.5, None, None), (0.5, None, None)),
    ],
)
@pytest.mark.parametrize("readers", [4, 8])
def test_token_shares_are_those_of_the_recipe(folder, readers, shares, expected):
    loader = open_recipe(make_recipe(folder, shares, readers=readers))
    counts = sum((count_tokens(loader.next_batch()) for _ in range(150)), Counter())
    natural = natural_tokens()
    rest = sum(natural[n] for n, s in zip(COUNTS, expected, strict=True) if s is None)
    given = sum(share or 0 for share in expected)
    for name, share in zip(COUNTS, expected, strict=True):
        if share is None:  # natural among themselves
            wanted = (1 - given) * natural[name] / rest
            assert shares_of(counts)[name] == pytest.approx(wanted, abs=0.02)
        else:
            assert shares_of(counts)[name] == pytest.approx(share, rel=0.02)


def test_shares_are_even_from_the_first_batches(folder):
    loader = open_recipe(make_recipe(folder, (1, 1, 1), readers=16))
    counts = sum((count_tokens(loader.next_batch()) for _ in range(6)), Counter())
    for share in shares_of(counts).values():
        assert share == pytest.approx(1 / 3, abs=0.06)


@pytest.mark.parametrize("shares", [(None, None, None), (0.2, 0.5, None)])
def test_any_processes_and_workers_have_the_same_batches(folder, shares):
    recipe = make_recipe(folder, shares, batch_size=32, readers=8)
    whole = open_recipe(recipe)
    batches = [whole.next_batch() for _ in range(40)]
    for first, second, workers in ((1, 4, 0), (8, 2, 0), (2, 1, 3)):
        split = [open_recipe(recipe, rank=r, ranks=first) for r in range(first)]
        check_parts(split, batches[:20])
        state = join_states([loader.state() for loader in split])
        other = replace(recipe, data=replace(recipe.data, workers=workers))
        resumed = [open_recipe(other, rank=r, ranks=second) for r in range(second)]
        try:
            for loader in resumed:
                loader.restore(json.loads(json.dumps(state)))
            check_parts(resumed, batches[20:])
        finally:
            for loader in resumed:
                loader.close()


def check_parts(loaders, batches):
    for batch in batches:
        for rank, loader in enumerate(loaders):
            part = loader.next_batch()
            assert (part.targets == batch.targets[rank :: len(loaders)]).all()
            assert (part.inputs == batch.inputs[rank :: len(loaders)]).all()


# What is read --------------------------------------------------------------------


def count_parsed(monkeypatch):
    parsed, parse = [], record_files.parse_json
    monkeypatch.setattr(
        record_files, "parse_json", lambda text: parsed.append(1) or parse(text)
    )
    return parsed


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_no_document_is_parsed_twice_in_an_epoch(tmp_path, monkeypatch, name):
    lines = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(4000))
    data = lines.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name[-1] == "z" else data)
    data = DataRecipe(
        train=(str(tmp_path / "a*"),), min_characters=0, min_tokens=0, readers=16
    )
    recipe = PretrainRecipe(data=replace(data, shuffle_block=1), batch_size=64)
    parsed = count_parsed(monkeypatch)
    loaders = [open_recipe(recipe, rank=rank, ranks=2) for rank in range(2)]
    for loader in loaders:
        loader.next_batch()
    assert len(parsed) <= 64 + 16  # a sequence needs a document
    epochs = [[0], [0]]
    while max(map(max, epochs)) == 0:
        for i, loader in enumerate(loaders):
            loader.next_batch()
            streams_ = loader.state()["streams"]
            epochs[i] = [stream["positions"][0][0] for stream in streams_]
    assert len(parsed) <= 4000 + 64 + 16


def test_documents_that_are_shuffled_together_are_bounded_by_characters(
    tmp_path, monkeypatch
):
    texts = [f"{i} " + "x" * 5000 for i in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    data = DataRecipe(train=(str(tmp_path / "a*"),), readers=1, **RULES)
    recipe = PretrainRecipe(data=data, batch_size=1)
    plans = [recipe, replace(recipe, data=replace(data, cache=str(tmp_path / "cache")))]
    monkeypatch.setattr(streams, "BLOCK_CHARACTERS", 30_000)
    parsed = count_parsed(monkeypatch)
    plain, cached = map(open_recipe, plans)
    plain.next_batch()
    assert len(parsed) == 6
    cached.next_batch()
    for _ in range(59):
        assert (plain.next_batch().inputs == cached.next_batch().inputs).all()
        assert plain.state() == cached.state()


def test_units_are_dealt_evenly_and_again_in_each_epoch(folder):
    recipe = make_recipe(folder, batch_size=8, readers=8)
    plan = plan_reading(recipe, tokenizer, LENGTH)
    dealer, (group,) = Dealer(plan), plan.groups
    deals = []
    for epoch in range(3):
        dealt = [dealer.deal(0, epoch, reader).tolist() for reader in range(8)]
        assert sorted(itertools.chain(*dealt)) == list(range(group.num_units))
        loads = []
        for units in dealt:
            loads.append(sum(dealer.find(0, unit)[0].part_bytes for unit in units))
        largest = max(file.part_bytes for file in group.files)
        assert max(loads) - min(loads) <= largest
        deals.append(dealt)
    assert deals[0] != deals[1] != deals[2]


# CoreNet's order of files ----------------------------------------------------------


def test_whole_files_are_dealt_as_corenet_deals_them(tmp_path):
    for i in range(7):
        lines = (json.dumps({"text": f"f{i} d{j}"}) + "\n" for j in range(4))
        (tmp_path / f"{i}.jsonl").write_text("".join(lines))
    data = DataRecipe(
        train=(str(tmp_path / "*"),),
        mixture="corenet",
        readers=3,
        min_characters=0,
        min_tokens=0,
    )
    loader = open_recipe(PretrainRecipe(data=data, batch_size=3, seed=1))
    rows = [[] for _ in range(3)]
    for _ in range(4 * 3 * 2):
        batch = loader.next_batch()
        for row, targets in zip(rows, batch.targets, strict=True):
            row.append(tokenizer.decode(targets[targets != IGNORED].tolist()))
    files = []  # of each reader, in its order
    for row in rows:
        starts = range(0, len(row), 4)
        for start in starts:
            name = row[start].split()[0]
            assert row[start : start + 4] == [f"{name} d{j}" for j in range(4)]
        files.append([row[start].split()[0] for start in starts])
    first = [name for own in zip(*files, strict=True) for name in own][:9]
    assert set(first) == {f"f{i}" for i in range(7)}  # and two drawn at random
    assert sorted(first[:7]) == [f"f{i}" for i in range(7)]
    for own in files:  # the next round has the same files
        assert sorted(own[:3]) == sorted(own[3:])


# Keys of recipes -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "{corpora: [{files: a, weight: 3}]}",
            r"data\.corpora\.weight is no longer .*documents.*token_share",
        ),
        ("{mixture: paper}", "mixture is 'paper'; expected natural or corenet"),
        ("{readers: 0}", "readers is 0"),
        ("{readers: 5}", r"readers is 5; it must divide batch_size \(16\)"),
        ("{corpora: [{files: a, token_share: 0}]}", r"token_share of a corpus is 0"),
        (
            "{mixture: corenet, corpora: [{files: a, token_share: 1}]}",
            "corenet.*leave out token_share",
        ),
        (
            "{corpora: [{files: a, token_share: 1}, {files: b}]}",
            "add up to 1; they must leave",
        ),
    ],
)
def test_wrong_mixtures_are_refused_with_what_to_do(tmp_path, data, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: {data}\n")
    with pytest.raises(OpenELMError, match=message):
        load_recipe(PretrainRecipe, str(path), {})


def test_a_key_in_the_wrong_place_is_named_with_its_group(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("readers: 8\n")
    with pytest.raises(OpenELMError, match=r"readers \(did you mean data\.readers\?\)"):
        load_recipe(PretrainRecipe, str(path), {})


def test_processes_that_read_other_files_are_refused(folder):
    recipe = make_recipe(folder, readers=2)
    states = []
    for rank in range(2):
        loader = open_recipe(recipe, rank=rank, ranks=2)
        loader.next_batch()
        states.append(loader.state())
        if rank == 0:  # the same size, cut into fewer parts
            path = folder / "pages-0.jsonl"
            size = path.stat().st_size
            array = '[{"text": "pp' + "x" * 100 + '"}]'
            path.write_text(array + " " * (size - len(array)))
    with pytest.raises(OpenELMError, match="different text"):
        join_states(states)
    with pytest.raises(OpenELMError, match="changed since the checkpoint: the text"):
        open_recipe(recipe).restore({**states[0], "streams": []})


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="needs Unix")
def test_a_reader_whose_files_have_no_text_is_refused_as_corenet_deals(folder):
    (folder / "pages-empty.jsonl").write_text("")
    loader = open_recipe(make_recipe(folder, readers=8, mixture="corenet"))
    signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("it hangs"))
    signal.alarm(20)
    try:
        with pytest.raises(
            OpenELMError, match=r"pages-empty\.jsonl\) is left.* natural"
        ):
            loader.next_batch()
    finally:
        signal.alarm(0)
