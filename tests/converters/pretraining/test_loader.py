"""Loaders: equal batches for any number of processes, each document once an epoch."""

import dataclasses
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from models import TEXT, small_tokenizer
from places import SUPPORT

pytest.importorskip("ftfy", reason="needs the torch extra")

from converters.pretraining.loader import (
    join_states,
    open_loader,
    read_recipe_documents,
)
from converters.pretraining.packing import (
    IGNORED,
    PackedSequences,
    read_corpora,
    step_batch,
)
from converters.pretraining.recipe import CorpusRecipe, DataRecipe, PretrainRecipe
from converters.pretraining.streams import CUT
from mlx_openelm.errors import OpenELMError

tokenizer = small_tokenizer()
LENGTH = 24


def write_jsonl(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": name}) + "\n" for name in names))


def make_recipe(files, *, batch_size=4, seed=3, corpora=(), **data):
    rules = {"words_per_piece": 2, "min_characters": 0, "min_tokens": 0}
    return PretrainRecipe(
        data=DataRecipe(train=files, corpora=corpora, **{**rules, **data}),
        batch_size=batch_size,
        seed=seed,
    )


def make_name(file, document):
    return f"{'long' * (document % 3 != 1)}f{file}d{document}"


@pytest.fixture(params=["many files", "few files"])
def corpus(request, tmp_path):
    """A recipe for 4 readers, with 5 or 2 files, and the names of its documents."""
    counts = [5, 1, 9, 4, 3] if request.param == "many files" else [17, 13]
    names = [[make_name(i, j) for j in range(n)] for i, n in enumerate(counts)]
    for i, documents in enumerate(names):
        write_jsonl(tmp_path / f"{i}.jsonl", documents)
    recipe = make_recipe((str(tmp_path / "*.jsonl"),), shuffle_block=4)
    return recipe, list(itertools.chain(*names))


def open_recipe(recipe, **options):
    return open_loader(recipe, tokenizer, LENGTH, **options)


def read_rows(batch):
    """Return the texts of a batch's rows."""
    texts = []
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        count = int((targets != IGNORED).sum())
        assert inputs[0] == tokenizer.bos_id
        assert (inputs[1:count] == targets[: count - 1]).all()
        assert not inputs[count:].any()
        texts.append(tokenizer.decode(targets[:count].tolist()))
    return texts


def take(loader, steps):
    return [read_rows(loader.next_batch()) for _ in range(steps)]


def same(a, b):
    return all(
        (x.inputs == y.inputs).all() and (x.targets == y.targets).all()
        for x, y in zip(a, b, strict=True)
    )


def by_epoch(loader, num_epochs):
    """Count the texts of each epoch, until every reader has passed `num_epochs`.

    A batch has one row of each reader.
    """
    seen = defaultdict(Counter)
    while True:
        rows = read_rows(loader.next_batch())
        epochs = [stream["positions"][0][0] for stream in loader.state()["streams"]]
        for text, epoch in zip(rows, epochs, strict=True):
            seen[epoch][text] += 1
        if min(epochs) >= num_epochs:
            return [seen[epoch] for epoch in range(num_epochs)]


def test_an_epoch_has_every_document_once(corpus):
    recipe, names = corpus
    for seen in by_epoch(open_recipe(recipe), 3):
        assert seen == Counter(names)


def test_documents_are_shuffled_by_seed_and_epoch(corpus):
    recipe, names = corpus
    first = take(open_recipe(recipe), 12)
    assert take(open_recipe(recipe), 12) == first
    assert take(open_recipe(dataclasses.replace(recipe, seed=4)), 12) != first
    alone = dataclasses.replace(recipe, batch_size=1)
    flat = [row for (row,) in take(open_recipe(alone), 2 * len(names))]
    assert flat[: len(names)] != flat[len(names) :]
    assert flat[: len(names)] != names


def test_a_block_of_one_keeps_the_order_of_a_file(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [str(i) for i in range(9)])
    recipe = make_recipe(
        (str(tmp_path / "*"),), batch_size=2, readers=1, shuffle_block=1
    )
    rows = take(open_recipe(recipe), 4)
    assert rows == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"]]


def test_documents_are_shuffled_within_blocks(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [str(i) for i in range(40)])
    recipe = make_recipe((str(tmp_path / "*"),), batch_size=1, shuffle_block=10)
    flat = [row for (row,) in take(open_recipe(recipe), 40)]
    orders = set()
    for start in range(0, 40, 10):
        block = [int(text) - start for text in flat[start : start + 10]]
        assert sorted(block) == list(range(10))
        orders.add(tuple(block))
    assert len(orders) == 4


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_shares_of_all_ranks_make_up_the_batch(corpus, ranks):
    recipe, _ = corpus
    whole = open_recipe(recipe)
    shares = [open_recipe(recipe, rank=rank, ranks=ranks) for rank in range(ranks)]
    for _ in range(20):
        batch = whole.next_batch()
        parts = [share.next_batch() for share in shares]
        for rank, part in enumerate(parts):
            assert (part.targets == batch.targets[rank::ranks]).all()
    assert sum((share.dropped for share in shares), Counter()) == whole.dropped
    assert join_states([share.state() for share in shares]) == whole.state()


def test_workers_change_neither_batches_nor_states_nor_counts(corpus):
    recipe, _ = corpus
    data = dataclasses.replace(recipe.data, min_characters=6)
    recipe = dataclasses.replace(recipe, data=data)
    more = dataclasses.replace(recipe, data=dataclasses.replace(data, workers=2))
    one, parallel = open_recipe(recipe), open_recipe(more)
    try:
        for _ in range(15):
            assert same([parallel.next_batch()], [one.next_batch()])
            assert parallel.state() == one.state()
        assert parallel.dropped == one.dropped != {}
    finally:
        parallel.close()


# Resuming ------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path):
    """Two corpora, documents of parallel pieces, some of which are dropped."""
    for i in range(5):
        texts = [f"a{i}.{j} long long {j} x y z" for j in range(i + 2)]
        write_jsonl(tmp_path / "a" / f"{i}.jsonl", texts)
    write_jsonl(tmp_path / "b.json", [f"b{j} longer and longer" for j in range(11)])
    corpora = (
        CorpusRecipe((str(tmp_path / "a" / "*"),), token_share=0.6),
        CorpusRecipe((str(tmp_path / "b.json"),)),
    )
    return make_recipe((), corpora=corpora, min_characters=5, shuffle_block=3)


def test_a_run_resumes_exactly_from_every_position(mixture):
    loader = open_recipe(mixture)
    states = [join_states([loader.state()])]
    batches = []
    for _ in range(60):
        batches.append(loader.next_batch())
        states.append(json.loads(json.dumps(join_states([loader.state()]))))
    assert states[-1]["streams"][0]["positions"][0][0] > 0  # into another epoch
    assert len({tuple(read_rows(batch)) for batch in batches}) > 50
    for i, state in enumerate(states[:-3]):
        resumed = open_recipe(mixture)
        resumed.restore(state)
        assert same([resumed.next_batch() for _ in range(3)], batches[i : i + 3])
        assert join_states([resumed.state()]) == states[i + 3]


def test_other_numbers_of_ranks_and_workers_resume_exactly(mixture):
    shares = [open_recipe(mixture, rank=rank, ranks=2) for rank in range(2)]
    for _ in range(9):
        for share in shares:
            share.next_batch()
    state = join_states([share.state() for share in shares])
    assert [stream["stream"] for stream in state["streams"]] == [0, 1, 2, 3]
    one = open_recipe(mixture)
    one.restore(state)
    expected = [one.next_batch().targets for _ in range(4)]
    for ranks, workers in ((4, 0), (1, 2)):
        mixture = dataclasses.replace(
            mixture, data=dataclasses.replace(mixture.data, workers=workers)
        )
        parallel = [open_recipe(mixture, rank=r, ranks=ranks) for r in range(ranks)]
        try:
            for loader in parallel:
                loader.restore(state)
            for rank, loader in enumerate(parallel):
                assert loader.state()["streams"] == state["streams"][rank::ranks]
            for targets in expected:
                for rank, loader in enumerate(parallel):
                    part = loader.next_batch().targets
                    assert (part == targets[rank::ranks]).all()
        finally:
            for loader in parallel:
                loader.close()


def test_a_running_loader_can_be_restored(mixture):
    loader = open_recipe(mixture)
    loader.next_batch()
    state = join_states([loader.state()])
    following = [loader.next_batch() for _ in range(5)]
    loader.restore(state)
    assert same([loader.next_batch() for _ in range(5)], following)


def test_a_corpus_may_move_but_not_change(corpus, tmp_path):
    recipe, _ = corpus
    loader = open_recipe(recipe)
    first = take(loader, 3)
    state = join_states([loader.state()])
    expected = take(loader, 3)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tmp_path.glob("*.jsonl"):
        path.rename(moved / path.name)
    data = dataclasses.replace(recipe.data, train=(str(moved / "*"),))
    recipe = dataclasses.replace(recipe, data=data)
    resumed = open_recipe(recipe)
    resumed.restore(state)
    assert take(resumed, 3) == expected != first

    def expect_error(other, reason):
        with pytest.raises(OpenELMError, match=f"checkpoint: {reason}. Restore"):
            open_recipe(other).restore(state)

    other = dataclasses.replace(recipe, seed=4, batch_size=2)
    expect_error(other, r"seed, batch_size, data\.readers")
    for change in ({"words_per_piece": 9}, {"shuffle_block": 9}, {"exclude": ("1*",)}):
        changed = dataclasses.replace(data, **change)
        expect_error(dataclasses.replace(recipe, data=changed), "the text")
    with pytest.raises(OpenELMError, match=r"checkpoint: the text\. Restore"):
        open_loader(recipe, small_tokenizer(301), LENGTH).restore(state)
    with (moved / "0.jsonl").open("a") as appended:
        appended.write('{"text": "one more"}\n')
    expect_error(recipe, "the text")
    with pytest.raises(OpenELMError, match="3 readers instead of 4"):
        loader.restore({**state, "streams": state["streams"][1:]})


def test_the_position_of_an_earlier_version_is_refused_with_a_command(corpus):
    loader = open_recipe(corpus[0])
    loader.next_batch()
    state = loader.state()
    lanes = [{"lane": i, "drawn": 3, "places": [[0] * 6]} for i in range(4)]
    for old in ({**state, "version": 1}, {"form": "lanes", "lanes": lanes}):
        with pytest.raises(OpenELMError, match=r"another version.*pretrain .*--init"):
            open_recipe(corpus[0]).restore(old)


def test_other_readers_are_other_batches_and_are_refused(corpus):
    recipe, _ = corpus
    loader = open_recipe(recipe)
    loader.next_batch()
    fewer = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, readers=2)
    )
    with pytest.raises(OpenELMError, match=r"data\.readers"):
        open_recipe(fewer).restore(loader.state())
    with pytest.raises(OpenELMError, match=r"readers is 2.*\(4\)"):
        open_recipe(fewer, ranks=4)


def test_damage_may_be_skipped_after_it_stopped_a_run(tmp_path):
    lines = [json.dumps({"text": f"n{i}"}) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:9], "{", *lines[9:]]))
    recipe = make_recipe(
        (str(tmp_path / "*"),), batch_size=2, readers=1, shuffle_block=1
    )
    loader = open_recipe(recipe)
    rows = take(loader, 4)
    state = loader.state()
    with pytest.raises(OpenELMError, match=r"Record 10 of .*a\.jsonl:10:2"):
        take(loader, 1)
    data = dataclasses.replace(recipe.data, on_damage="skip")
    resumed = open_recipe(dataclasses.replace(recipe, data=data))
    resumed.restore(state)
    rows += take(resumed, 11)
    assert [row for pair in rows for row in pair] == [f"n{i}" for i in range(30)]


# Mixing, counting ----------------------------------------------------------------


def test_dropped_text_is_counted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["ab", "abcdefgh" * 5, "abcdefgh", "w v"])
    recipe = make_recipe(
        (str(tmp_path / "*"),),
        batch_size=1,
        words_per_piece=1,
        min_characters=2,
        min_tokens=6,
    )
    loader = open_recipe(recipe)
    assert loader.dropped == {}
    take(loader, 1)
    state = join_states([loader.state()])
    take(loader, 3)
    first = loader.dropped.copy()
    counted = len(tokenizer.encode("abcdefgh" * 5)) + 1 - (LENGTH + 1)
    assert counted > 0
    assert first["too few characters"] in (2, 4)  # the words w and v, once an epoch
    assert first["too few tokens"] in (1, 2)
    assert first[CUT] == 2 * counted
    loader.restore(state)
    take(loader, 3)
    assert loader.dropped != first  # it counts the batches after that, too


def test_padding_has_no_targets(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["a king"])
    recipe = make_recipe((str(tmp_path / "*"),), batch_size=1)
    batch = open_recipe(recipe).next_batch()
    ids = [*tokenizer.encode("a king"), tokenizer.eos_id]
    assert batch.inputs.shape == batch.targets.shape == (1, LENGTH)
    assert batch.inputs.dtype == batch.targets.dtype == np.int64
    assert batch.inputs[0, : len(ids) - 1].tolist() == ids[:-1]
    assert batch.targets[0, : len(ids) - 1].tolist() == ids[1:]
    assert (batch.targets[0, len(ids) - 1 :] == IGNORED).all()


# Bad input -----------------------------------------------------------------------


@pytest.fixture
def thousands(tmp_path):
    """2000 files, one of which is truncated."""
    for i in range(2000):
        record = json.dumps({"text": f"n{i}"}).encode() + b"\n"
        data = gzip.compress(record * 3, 1)
        path = tmp_path / f"{i:04}.jsonl.gz"
        path.write_bytes(data[: -len(data) // 3] if i == 1234 else data)
    return make_recipe((f"{tmp_path}/{{0000..1999}}.jsonl.gz",), batch_size=8)


def test_a_damaged_file_among_thousands_stops_the_run_and_is_reported(thousands):
    loader = open_recipe(thousands)
    with pytest.raises(OpenELMError, match=r"1234\.jsonl\.gz is damaged or truncated"):
        by_epoch(loader, 1)


def test_a_damaged_file_among_thousands_is_skipped_and_counted(thousands):
    data = dataclasses.replace(thousands.data, on_damage="skip")
    loader = open_recipe(dataclasses.replace(thousands, data=data))
    (seen,) = by_epoch(loader, 1)
    assert sum(seen.values()) in range(1999 * 3, 1999 * 3 + 3)
    assert {f"n{i}" for i in range(2000)} - {"n1234"} <= set(seen)
    ((reason, count),) = loader.dropped.items()
    assert reason.endswith("1234.jsonl.gz, damaged")
    assert count in (1, 2)  # once an epoch


def test_a_missing_file_is_skipped_and_counted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere")
    recipe = make_recipe((str(tmp_path / "*"),), batch_size=1)
    with pytest.raises(OpenELMError, match=r"b\.jsonl is damaged or truncated"):
        by_epoch(open_recipe(recipe), 1)
    for cache in (None, str(tmp_path / "cache")):
        data = dataclasses.replace(recipe.data, on_damage="skip", cache=cache)
        loader = open_recipe(dataclasses.replace(recipe, data=data))
        assert by_epoch(loader, 1) == [Counter(["one", "two"])]
        assert set(loader.dropped) == {f"rest of {tmp_path}/b.jsonl, damaged"}


def test_a_bad_record_alone_is_dropped(tmp_path):
    lines = [json.dumps({"text": f"n{i}"}) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:20], "{", *lines[20:]]))
    write_jsonl(tmp_path / "b.jsonl", [f"m{i}" for i in range(9)])
    recipe = make_recipe((str(tmp_path / "*"),), on_damage="skip", shuffle_block=2)
    loader = open_recipe(recipe)
    expected = Counter([f"n{i}" for i in range(30)] + [f"m{i}" for i in range(9)])
    for seen in by_epoch(loader, 3):
        assert seen == expected
    assert set(loader.dropped) == {f"damaged records of {tmp_path}/a.jsonl"}
    assert 3 <= loader.dropped.total() <= 5  # once an epoch


def test_a_corpus_smaller_than_the_batch_is_read_once_an_epoch(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    for seen in by_epoch(open_recipe(make_recipe((str(tmp_path / "*"),))), 5):
        assert seen == Counter(["one", "two", "three"])


def test_a_corpus_that_cannot_be_cut_has_fewer_readers(tmp_path):
    texts = [f"n{i}" for i in range(20)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    files = (str(tmp_path / "*"),)
    with pytest.raises(OpenELMError, match=r"a\.json.*1 part, .*4 readers; lower"):
        open_recipe(make_recipe(files, readers=4))
    loader = open_recipe(make_recipe(files))  # with one
    assert sorted(row for rows in take(loader, 5) for row in rows) == sorted(texts)
    with pytest.raises(OpenELMError, match=r"readers is 1; .*\(2\)"):
        open_recipe(make_recipe(files), ranks=2)


def test_a_corpus_without_text_that_is_kept_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    files = (str(tmp_path / "*"),)
    for readers in (1, 4):
        short = make_recipe(files, readers=readers, min_tokens=99, min_characters=4)
        message = r"a\.jsonl.*\d too few characters, \d too few tokens.*min_tokens"
        with pytest.raises(OpenELMError, match=message):
            take(open_recipe(short), 1)
    (tmp_path / "a.jsonl").write_text("\n" * 50)
    with pytest.raises(OpenELMError, match="no documents"):
        take(open_recipe(make_recipe(files)), 1)


def test_files_without_kept_pieces_are_allowed_among_others(tmp_path):
    for i, names in enumerate([[], ["short"], ["long words"], ["many words"]]):
        write_jsonl(tmp_path / f"{i}.jsonl", names)
    (tmp_path / "4.jsonl").symlink_to(tmp_path / "nowhere")
    files = (str(tmp_path / "*"),)
    recipe = make_recipe(files, min_characters=6, on_damage="skip", batch_size=5)
    loader = open_recipe(recipe)
    assert take(loader, 50)
    assert loader.dropped["too few characters"] > 10


def test_ranks_must_divide_the_batch_and_patterns_must_match(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    recipe = make_recipe((str(tmp_path / "*"),))
    with pytest.raises(OpenELMError, match=r"batch_size is 4; .* \(3\)"):
        open_recipe(recipe, ranks=3)
    with pytest.raises(OpenELMError, match="No file matches"):
        open_recipe(make_recipe((str(tmp_path / "*.parquet"),)))
    with pytest.raises(OpenELMError, match="excludes all of its files"):
        open_recipe(make_recipe((str(tmp_path / "*"),), heldout=("a.jsonl",)))


# Workers -------------------------------------------------------------------------


def test_an_error_in_a_worker_is_raised_after_the_valid_batches(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"n{i}" for i in range(8)])
    with (tmp_path / "a.jsonl").open("a") as opened:
        opened.write("{\n")
    recipe = make_recipe(
        (str(tmp_path / "*"),), batch_size=2, shuffle_block=2, workers=2
    )
    loader = open_recipe(recipe)
    try:
        for _ in range(2):
            loader.next_batch()
        with pytest.raises(
            OpenELMError, match=r"^Record 9 of .*a\.jsonl:9:2 is not JSON"
        ):
            take(loader, 9)
    finally:
        loader.close()


def test_a_killed_worker_is_reported_and_orphans_end(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["7" * 50_000] * 8)  # more than a pipe holds
    program = f"""
import os, signal, sys, time
sys.path.insert(0, {str(SUPPORT)!r})
from models import small_tokenizer
from converters.pretraining.loader import open_loader
from mlx_openelm.errors import OpenELMError
from converters.pretraining.recipe import DataRecipe, PretrainRecipe

if __name__ == "__main__":
    data = DataRecipe(train=({str(tmp_path / "a.jsonl")!r},), workers=2,
                      min_characters=0, min_tokens=0)
    recipe = PretrainRecipe(data=data, batch_size=2)
    loader = open_loader(recipe, small_tokenizer(), 49_000)
    loader.next_batch()
    workers = [part._process.pid for part in loader._parts]
    if sys.argv[1] == "orphans":
        print(*workers, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)  # until it is sending a message
    os.kill(workers[1], signal.SIGKILL)
    try:
        for _ in range(20):
            loader.next_batch()
    except OpenELMError as error:
        print(error)
"""
    script = tmp_path / "program.py"
    script.write_text(program)
    command = [sys.executable, str(script)]
    done = subprocess.run([*command, "kill"], capture_output=True, text=True)
    assert "ended with exit code -9" in done.stdout, done.stderr
    done = subprocess.run([*command, "orphans"], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    end = time.monotonic() + 20
    for pid in map(int, done.stdout.split()):
        while is_running(pid):
            assert time.monotonic() < end
            time.sleep(0.1)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True)
    return not state.stdout.startswith(b"Z")  # a zombie


# Packed text ---------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_batches_are_those_of_step_batch_and_resume(tmp_path, ranks):
    (tmp_path / "a.txt").write_text(TEXT)
    recipe = make_recipe((str(tmp_path / "*.txt"),), packing=True)
    corpus = read_corpora(recipe.data)
    sequences = PackedSequences(corpus.documents, tokenizer, 16)
    options = {"batch_size": 4, "seed": 3, "rank": ranks - 1, "ranks": ranks}
    expected = [step_batch(sequences, step=i, **options) for i in range(40)]
    loader = open_loader(recipe, tokenizer, 16, rank=ranks - 1, ranks=ranks)
    assert (loader.num_files, loader.num_documents) == (1, 1)
    assert loader.num_sequences == len(sequences)
    assert loader.num_tokens == sequences.num_tokens
    assert same([loader.next_batch() for _ in range(25)], expected[:25])
    state = join_states([loader.state()] * ranks)
    again = open_loader(
        recipe, tokenizer, 16, rank=ranks - 1, ranks=ranks, corpus=corpus
    )
    again.restore(json.loads(json.dumps(state)))
    assert same([again.next_batch() for _ in range(15)], expected[25:])
    (tmp_path / "a.txt").write_text(TEXT + "more")
    with pytest.raises(OpenELMError, match=r"checkpoint: the text\. Restore"):
        open_loader(recipe, tokenizer, 16).restore(state)
    streamed = dataclasses.replace(recipe.data, packing=False)
    with pytest.raises(OpenELMError, match=r"data\.packing, .*the text"):
        open_recipe(dataclasses.replace(recipe, data=streamed)).restore(state)


def test_packed_corpora_have_no_shares(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    write_jsonl(tmp_path / "b.jsonl", [TEXT, "The end."])
    files = ((str(tmp_path / "a.txt"),), (str(tmp_path / "b.jsonl"),))
    corpora = tuple(map(CorpusRecipe, files))
    loader = open_recipe(make_recipe((), corpora=corpora, packing=True))
    assert (loader.num_files, loader.num_documents) == (2, 3)
    corpora = (corpora[0], dataclasses.replace(corpora[1], token_share=0.2))
    with pytest.raises(OpenELMError, match="leave out token_share"):
        make_recipe((), corpora=corpora, packing=True)


# Texts ---------------------------------------------------------------------------


def test_documents_of_the_whole_text_the_held_out_part_or_a_sample(tmp_path):
    for name in ("a", "b"):
        texts = [f"“{name}{i}”" for i in range(50)]
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    (tmp_path / "heldout.txt").write_text("ﬁne\nHEADING\nx")
    data = DataRecipe(
        train=(str(tmp_path / "*"),),
        heldout=(str(tmp_path / "heldout.txt"),),
        document_start="[A-Z]+",
    )
    whole = list(read_recipe_documents(data))
    assert whole == [f'"{name}{i}"' for name in "ab" for i in range(50)]
    assert list(read_recipe_documents(data, heldout=True)) == ["fine\nHEADING\nx"]
    sample = list(read_recipe_documents(data, characters=20))
    assert sample == ['"a0"', '"b0"', '"a1"', '"b1"', '"a2"']
    assert sorted(read_recipe_documents(data, characters=10**9)) == sorted(whole)
    with (tmp_path / "a.jsonl").open("a") as opened:
        opened.write("{\n")
    with pytest.raises(OpenELMError, match="Record 51"):
        list(read_recipe_documents(data))
    skipping = dataclasses.replace(data, on_damage="skip")
    assert list(read_recipe_documents(skipping)) == whole
    with (tmp_path / "a.jsonl").open("a") as opened:
        opened.write('{"text": "more"}\n')
    assert sorted(read_recipe_documents(skipping)) == sorted([*whole, "more"])


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_too_many_open_files_is_not_skipped_as_damage(tmp_path, ending):
    resource = pytest.importorskip("resource")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for i in range(150):
        if ending == "jsonl":
            write_jsonl(tmp_path / f"{i}.jsonl", [f"x{i}"] * 9)
        else:
            table = pyarrow.table({"text": [f"x{i}"] * 9})
            parquet.write_table(table, tmp_path / f"{i}.parquet")
    recipe = make_recipe(
        (str(tmp_path / "*"),),
        batch_size=150,
        readers=150,
        shuffle_block=2,
        on_damage="skip",
    )
    loader = open_recipe(recipe)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (120, hard))
    try:
        with pytest.raises(OpenELMError, match=r"too many files are open.*ulimit"):
            take(loader, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_sample_of_thousands_of_files_opens_few_at_once(tmp_path):
    resource = pytest.importorskip("resource")
    for i in range(600):
        write_jsonl(tmp_path / f"{i:03}.jsonl", [f"x{i:03}", "y"])
    data = DataRecipe(train=(str(tmp_path / "*"),))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        sample = list(read_recipe_documents(data, characters=400))
        assert len(list(read_recipe_documents(data, characters=10**9))) == 1200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sample[0] == "x000"
    assert sample[99] > "x480"  # from all files
