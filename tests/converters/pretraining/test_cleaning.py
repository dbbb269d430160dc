"""The rules of the published pipeline, each with a kept and a dropped text."""

import pytest
from models import TEXT, small_tokenizer

pytest.importorskip("ftfy", reason="needs the torch extra")

from converters.pretraining.cleaning import (
    FEW_CHARACTERS,
    FEW_TOKENS,
    Rules,
    count_characters,
    make_pieces,
    repair,
    tokenize,
)
from converters.pretraining.recipe import DataRecipe

tokenizer = small_tokenizer()
PUBLISHED = Rules.of(DataRecipe(), 2048)
NO_LIMITS = Rules(words_per_piece=2048, min_characters=0, min_tokens=0, length=2048)


def pieces(text, rules=PUBLISHED):
    return list(make_pieces(text, tokenizer, rules))


def test_the_published_numbers_are_the_defaults():
    assert (
        Rules(words_per_piece=2048, min_characters=200, min_tokens=256, length=2048)
        == PUBLISHED
    )


def test_a_document_is_split_at_single_spaces_into_pieces_of_words():
    rules = Rules(words_per_piece=3, min_characters=0, min_tokens=0, length=64)
    cut = pieces("a b c d\ne\tf  g h", rules)  # two spaces have an empty word between
    texts = [tokenizer.decode(piece.tokens.tolist()) for piece in cut]
    assert texts == ["a b c", "d\ne\tf  g", "h"]
    assert len(pieces("word " * 2047 + "word")) == 1
    assert len(pieces("word " * 2048 + "word")) == 2
    assert len(pieces("")) == 1
    later = list(make_pieces("a b c d\ne\tf  g h", tokenizer, rules, start=1))
    assert [p.tokens.tolist() for p in later] == [p.tokens.tolist() for p in cut[1:]]


@pytest.mark.parametrize(
    ("letters", "reason"), [(200, FEW_TOKENS), (199, FEW_CHARACTERS)]
)
def test_a_piece_below_200_characters_is_dropped(letters, reason):
    rules = Rules(words_per_piece=2048, min_characters=200, min_tokens=9999, length=64)
    assert [p.dropped for p in pieces("x" * letters, rules)] == [reason]


def test_punctuation_and_repeated_white_space_do_not_count_as_characters():
    assert count_characters("  A,  b\n\t c!?  -- d  ") == len("a b c d")
    assert count_characters("...") == 0
    # Lower-casing, which is published, matters only where it changes lengths.
    assert count_characters("\u0130") == 2


def test_characters_are_counted_before_the_text_is_repaired():
    grown = "\ufb03 " * 70  # 70 ligatures and the spaces between: 139; repaired: 279
    assert count_characters(grown) < 200 < count_characters(repair(grown))
    assert pieces(grown)[0].dropped == FEW_CHARACTERS
    shrunk = "&amp;" * 60  # 180 letters "amp"
    rules = Rules(words_per_piece=9, min_characters=180, min_tokens=0, length=999)
    assert count_characters(repair(shrunk)) == 0
    assert not pieces(shrunk, rules)[0].dropped


def test_words_are_counted_before_the_text_is_repaired():
    rules = Rules(words_per_piece=2, min_characters=0, min_tokens=0, length=64)
    spaced = "a\u00a0b c d"  # the no-break space becomes a space: words a, b
    assert [tokenizer.decode(p.tokens.tolist()) for p in pieces(spaced, rules)] == [
        repair("a\u00a0b c"),
        "d",
    ]


def test_text_is_repaired_as_in_corenet():
    assert repair("“Quoted” ﬁne café &amp; schÃ¶n\r\n") == (
        '"Quoted" fine café & schön\n'
    )
    assert repair("a\x00\x1b[31mb\ud800 \uff21") == "ab\ufffd A"
    odd = "“ﬁne” cafe\u0301 " * 40
    (piece,) = pieces(odd, NO_LIMITS)
    assert piece.tokens.tolist() == tokenize('"fine" café ' * 40, tokenizer)


@pytest.mark.parametrize(("min_tokens", "dropped"), [(11, ""), (12, FEW_TOKENS)])
def test_bos_and_eos_count_as_tokens(min_tokens, dropped):
    text = "123456789"[:8]
    assert len(tokenizer.encode(text, bos=False)) == 9  # and the dummy space
    rules = Rules(1, 0, min_tokens, 64)
    (piece,) = pieces(text, rules)
    assert piece.dropped == dropped
    assert len(piece.tokens) == (0 if dropped else 11)


def test_a_sequence_has_bos_and_eos_and_at_most_2049_tokens():
    (short,) = pieces(TEXT)
    ids = short.tokens.tolist()
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert ids[1:-1] == tokenizer.encode(TEXT, bos=False)
    assert short.num_cut == 0
    text = "7" * 2046  # 2047 tokens with the dummy space
    (full,) = pieces(text)
    assert (len(full.tokens), full.tokens[-1]) == (2049, tokenizer.eos_id)
    (cut,) = pieces(text + "8888")
    assert len(cut.tokens) == 2049
    assert cut.num_cut == 4
    assert cut.tokens[-1] != tokenizer.eos_id
