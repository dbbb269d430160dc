"""Documents become sequences by the published rules."""

import numpy as np
import pytest
from models import TEXT, small_tokenizer

pytest.importorskip("ftfy", reason="needs the torch extra")

from converters.corpus import (
    IGNORED,
    PackedSequences,
    PaddedSequences,
    clean,
    read_corpus,
    step_batch,
    train_tokenizer,
)
from mlx_openelm.errors import OpenELMError
from mlx_openelm.pretrain_recipe import DataRecipe, TokenizerRecipe

tokenizer = small_tokenizer()


def test_text_is_repaired_as_corenet_repairs_it():
    assert clean("“Quoted” ﬁne café &amp; schÃ¶n\r\n") == (
        '"Quoted" fine café & schön\n'
    )


def test_a_pieces_first_tokens_stand_between_bos_and_eos_and_padding_is_ignored():
    sequences = PaddedSequences(
        ["a king " * 8], tokenizer, DataRecipe(min_characters=1, min_tokens=1), 64
    )
    batch = sequences.batch([0], 0, 0)
    ids = [*tokenizer.encode("a king " * 8), tokenizer.eos_id]
    length = len(ids) - 1
    assert length < 64
    assert batch.inputs[0, :length].tolist() == ids[:-1]
    assert batch.targets[0, :length].tolist() == ids[1:]
    assert (batch.targets[0, length:] == IGNORED).all()
    cut = PaddedSequences(
        ["a king " * 200], tokenizer, DataRecipe(min_characters=1, min_tokens=1), 64
    ).batch([0], 0, 0)
    assert (cut.targets != IGNORED).all()
    assert cut.targets[0, 0] == cut.inputs[0, 1]


def test_documents_are_cut_by_words_and_short_pieces_are_counted():
    recipe = DataRecipe(words_per_piece=50, min_characters=100, min_tokens=60)
    long = "the old woman said to the king that the wolf was there " * 9  # 108 words
    sequences = PaddedSequences([long, "too short"], tokenizer, recipe, 64)
    assert len(sequences) == 2  # 50 + 50 words; the last 8 are too few
    assert sequences.dropped == {"too few characters": 2}
    with pytest.raises(OpenELMError, match="too few tokens"):
        PaddedSequences(
            [long], tokenizer, DataRecipe(min_characters=1, min_tokens=9999), 64
        )


def test_only_letters_count_towards_the_shortest_piece():
    recipe = DataRecipe(min_characters=20, min_tokens=1)
    with pytest.raises(OpenELMError, match="too few characters"):
        PaddedSequences(["!?.,;: " * 100 + "a b"], tokenizer, recipe, 64)


def test_packed_windows_are_begun_with_bos_and_lose_nothing():
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
    found = {tuple(row) for row in batch.targets.tolist()}
    assert found <= windows
    assert len(windows) - len(found) <= 1  # what the offset needs at the end


def test_each_epoch_has_its_own_order_and_cuts():
    sequences = PackedSequences([TEXT], tokenizer, 16)
    everything = range(len(sequences))
    first, again, second = (
        sequences.batch(everything, 1, epoch).targets for epoch in (0, 0, 1)
    )
    assert (first == again).all()
    assert sorted(map(tuple, first)) != sorted(map(tuple, second))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_shares_make_up_the_batch_of_one(ranks):
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
    assert count % 7  # the last step reaches into the next epoch
    seen = []
    for step in range(-(-count // 7)):
        batch = step_batch(sequences, step=step, batch_size=7, seed=2, rank=0, ranks=1)
        seen += [tuple(row) for row in batch.targets.tolist()]
    expected = sequences.batch(range(count), 2, 0).targets.tolist()
    assert seen[:count] == [tuple(row) for row in expected]


def test_headings_begin_documents_and_stay_together(tmp_path):
    (tmp_path / "book.txt").write_text(
        "A preface.\n\nPART ONE\n\nTHE FOX\n\nA fox ran.\n\nTHE CROW\n\nA crow sat.\n"
    )
    corpus = read_corpus([str(tmp_path / "*.txt")], document_start="[A-Z ]{4,}")
    assert corpus.documents == (
        "A preface.",
        "PART ONE\n\nTHE FOX\n\nA fox ran.",
        "THE CROW\n\nA crow sat.",
    )
    assert read_corpus([str(tmp_path / "*.txt")]).documents[0].endswith("A crow sat.\n")


def test_excluded_files_are_not_read_and_wrong_patterns_are_named(tmp_path):
    for name in ("a.txt", "b.txt", "oz-1.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    patterns = [str(tmp_path / "*.txt")]
    corpus = read_corpus(patterns, exclude=["oz-*.txt", str(tmp_path / "b.txt")])
    assert corpus.documents == ("text of a.txt",)
    with pytest.raises(OpenELMError, match="No file matches"):
        read_corpus([str(tmp_path / "*.md")])
    with pytest.raises(OpenELMError, match="excludes every file"):
        read_corpus(patterns, exclude=["*.txt"])
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(OpenELMError, match=r"c\.txt as UTF-8"):
        read_corpus(patterns)


def test_a_trained_tokenizer_is_lossless_and_has_llamas_ids():
    trained = train_tokenizer([TEXT, "日本語 text"], TokenizerRecipe(vocab_size=320))
    assert trained.vocab_size == 320
    assert (trained.bos_id, trained.eos_id) == (1, 2)
    assert trained.processor.unk_id() == 0
    assert trained.processor.IdToPiece(3) == "<0x00>"
    for text in ("  two  spaces ", "\n\n\tx\n", "“Ünïcödé” \U0001f409 ﬁ", "", TEXT):
        assert trained.decode(trained.encode(text)) == text
