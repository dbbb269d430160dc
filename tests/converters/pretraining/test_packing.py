"""Training text in memory: packed sequences, and training of a tokenizer."""

import dataclasses
import gzip
import hashlib
import os
import re

import numpy as np
import pytest
from models import TEXT, small_tokenizer

pytest.importorskip("ftfy", reason="needs the torch extra")

from converters.pretraining.loader import open_loader
from converters.pretraining.packing import (
    PackedSequences,
    read_corpora,
    read_corpus,
    step_batch,
    train_tokenizer,
)
from converters.pretraining.recipe import DataRecipe, PretrainRecipe, TokenizerRecipe
from mlx_openelm.errors import OpenELMError
from mlx_openelm.recipe_loader import load_recipe

tokenizer = small_tokenizer()


def test_packed_windows_start_with_bos_and_cover_the_text():
    sequences = PackedSequences([TEXT[:500], "The end."], tokenizer, 16)
    batch = sequences.batch(range(len(sequences)), seed=5, epoch=0)
    assert (batch.inputs[:, 0] == tokenizer.bos_id).all()
    assert (batch.inputs[:, 1:] == batch.targets[:, :-1]).all()
    stream = [
        *tokenizer.encode(TEXT[:500], bos=False),
        tokenizer.eos_id,
        *tokenizer.encode("The end.", bos=False),
        tokenizer.eos_id,
    ]
    assert sequences.num_tokens == len(stream)
    windows = {tuple(stream[i : i + 16]) for i in range(0, len(stream) - 15, 16)}
    targets = {tuple(row) for row in batch.targets.tolist()}
    assert targets <= windows
    assert len(windows) - len(targets) <= 1  # reserved for the offset


def test_each_epoch_has_its_own_order_and_offset():
    sequences = PackedSequences([TEXT], tokenizer, 16)
    everything = range(len(sequences))
    first, again, second = (
        sequences.batch(everything, 1, epoch).targets for epoch in (0, 0, 1)
    )
    assert (first == again).all()
    assert sorted(map(tuple, first)) != sorted(map(tuple, second))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_shares_of_all_ranks_make_up_the_batch(ranks):
    sequences = PackedSequences([TEXT], tokenizer, 16)
    options = {"step": 3, "batch_size": 8, "seed": 2}
    whole = step_batch(sequences, **options, rank=0, ranks=1)
    parts = [
        step_batch(sequences, **options, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    joined = np.concatenate([part.targets for part in parts])
    assert (joined == whole.targets).all()


def test_an_epoch_sees_every_sequence_once_across_steps():
    sequences = PackedSequences([TEXT], tokenizer, 16)
    count = len(sequences)
    assert count % 7  # the last step includes the next epoch
    seen = []
    for step in range(-(-count // 7)):
        batch = step_batch(sequences, step=step, batch_size=7, seed=2, rank=0, ranks=1)
        seen += [tuple(row) for row in batch.targets.tolist()]
    expected = sequences.batch(range(count), 2, 0).targets.tolist()
    assert seen[:count] == [tuple(row) for row in expected]


def test_plain_text_is_repaired_before_headings_are_matched(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("A preface.\r\n\r\nTHE “ﬀ”\r\n\r\nA fox ran.\r\nTHE CROW\n x \n")
    corpus = read_corpus([str(book)], document_start='[A-Z "f]{4,}')
    assert corpus.documents == (
        "A preface.",
        'THE "ff"\n\nA fox ran.',
        "THE CROW\n x",
    )
    assert read_corpus([str(book)]).documents[0].endswith("ran.\nTHE CROW\n x \n")


def test_every_format_can_be_packed(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"body": "ﬁne\\nHEAD\\nx"}\n{"body": "two"}\n')
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"HEAD\none\nHEAD\nmore"))
    (tmp_path / "heldout.txt").write_text("not read")
    data = DataRecipe(
        train=(str(tmp_path / "*"),),
        text_key="body",
        heldout=(str(tmp_path / "heldout.txt"),),
        document_start="HEAD",
    )
    corpus = read_corpora(data)
    assert corpus.documents == ("HEAD\none", "HEAD\nmore", "fine\nHEAD\nx", "two")
    assert corpus.num_files == 2


def test_empty_text_cannot_be_packed(tmp_path):
    for documents in ([], [""]):
        with pytest.raises(OpenELMError, match="too few for one sequence"):
            PackedSequences(documents, tokenizer, 16)
    (tmp_path / "a.jsonl").write_text("")
    data = DataRecipe(train=(str(tmp_path / "*"),), packing=True)
    with pytest.raises(OpenELMError, match="0 tokens, too few"):
        open_loader(PretrainRecipe(data=data), tokenizer, 16)


def test_damaged_files_stop_packing_or_are_skipped(tmp_path):
    lines = b'{"text": "a story"}\n' * 98 + b'{"text": 5}\n{"text": "a story"}\n'
    whole = gzip.compress(lines + os.urandom(999).replace(b"\n", b"x"))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-99])
    (tmp_path / "good.jsonl").write_text('{"text": "another"}\n')
    data = DataRecipe(train=(str(tmp_path / "*"),), packing=True)
    with pytest.raises(OpenELMError, match=r"cut\.jsonl\.gz"):
        read_corpora(data)
    skipping = dataclasses.replace(data, on_damage="skip")
    corpus = read_corpora(skipping)
    assert corpus.documents == (*["a story"] * 99, "another")
    cut = f"{tmp_path}/cut.jsonl.gz"
    dropped = {f"damaged records of {cut}": 1, f"rest of {cut}, damaged": 1}
    assert corpus.dropped == dropped
    recipe = PretrainRecipe(data=skipping, batch_size=2)
    loaders = [open_loader(recipe, tokenizer, 16, rank=r, ranks=2) for r in (0, 1)]
    assert [loader.dropped for loader in loaders] == [dropped, {}]


def test_the_stories_are_those_of_the_demo_model(shared):
    """The hash is of the documents that the demo model was trained on."""
    recipe = load_recipe(PretrainRecipe, "pretrain/stories", {})
    books = str(shared / "data/stories/text/a*.txt")
    data = dataclasses.replace(recipe.data, train=(books,))
    digest = hashlib.sha256()
    for document in read_corpora(data).documents:
        digest.update(document.encode() + b"\0")
    assert digest.hexdigest() == (
        "849a1508b155ecdc25dd91e8d856e963313f0e3df8c333612a21de9bb3bd04ed"
    )


def test_a_trained_tokenizer_is_lossless_and_has_llamas_ids():
    trained = train_tokenizer([TEXT, "日本語 text"], TokenizerRecipe(vocab_size=320))
    assert trained.vocab_size == 320
    assert (trained.bos_id, trained.eos_id) == (1, 2)
    assert trained.processor.unk_id() == 0
    assert trained.processor.IdToPiece(3) == "<0x00>"
    for text in ("  two  spaces ", "\n\n\tx\n", "“Ünïcödé” \U0001f409 ﬁ", "", TEXT):
        assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        (5000, r"Vocabulary size too high \(5000\)\. .* a value <= \d+\."),
        (100, r"Vocabulary size is smaller than required_chars\. [^\[]*\w\."),
    ],
)
def test_a_tokenizer_that_cannot_be_trained_is_refused_with_the_reason(pieces, reason):
    with pytest.raises(OpenELMError) as refused:
        train_tokenizer([TEXT], TokenizerRecipe(vocab_size=pieces))
    message = rf"Cannot train a tokenizer with {pieces} pieces \(.*\) on this text: "
    assert re.fullmatch(message + reason, str(refused.value)), refused.value
