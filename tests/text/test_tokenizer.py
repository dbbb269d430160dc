import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import small_tokenizer

from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.tokenizer import SPACE, Tokenizer

tokenizer = small_tokenizer()
texts = st.text(st.characters(exclude_characters=SPACE, exclude_categories=["Cs"]))


def streamed(ids):
    decoder = tokenizer.stream_decoder()
    return "".join(decoder.add(i) for i in ids) + decoder.finish()


def byte_ids(data: bytes) -> list[int]:
    return [tokenizer.processor.PieceToId(f"<0x{b:02X}>") for b in data]


@given(texts)
@example("  two leading spaces, and three   inside ")
@example("日本語 \U0001f469‍\U0001f680 café\n\n\tend\n")
@example("")
def test_decoding_inverts_encoding(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
@example(byte_ids("\U0001f600".encode()))
@example([*byte_ids("\U0001f600".encode()[:3]), 2, *byte_ids(b"\x80A")])
@example([1, 2, *tokenizer.encode("a b", bos=False), 2, 2, 1])
@example([0, 1, 0])
@example([*byte_ids(b"\xe2\xe2\x82\xac"), 1])
def test_the_joined_stream_equals_decode(ids):
    assert streamed(ids) == tokenizer.decode(ids)


@settings(max_examples=200)
@given(
    st.lists(
        st.sampled_from([0, 1, 2, *byte_ids(bytes(range(0x7E, 0x100))), 260, 270, 280]),
        max_size=12,
    )
)
def test_any_bytes_are_decoded_as_sentencepiece_decodes_them(ids):
    assert streamed(ids) == tokenizer.decode(ids)


@given(texts)
def test_a_stream_never_yields_half_a_character(text):
    decoder = tokenizer.stream_decoder()
    streamed = ""
    for token in tokenizer.encode(text):
        streamed += decoder.add(token)
        assert text.startswith(streamed)
    assert streamed == text


@given(texts, st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
def test_a_continuation_keeps_its_first_space(prompt, ids):
    before = tokenizer.encode(prompt)
    decoder = tokenizer.stream_decoder(after=before)
    streamed = "".join(decoder.add(i) for i in ids) + decoder.finish()
    whole = tokenizer.decode([*before, *ids])
    ends_in_byte = tokenizer.processor.IsByte(before[-1])  # may join the next bytes
    assert ends_in_byte or prompt + streamed == whole


def test_a_pending_byte_is_replaced_at_the_end():
    decoder = tokenizer.stream_decoder()
    assert decoder.add(byte_ids(b"\xe2")[0]) == ""
    assert decoder.finish() == "\ufffd"


@given(texts)
def test_there_is_exactly_one_bos(text):
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert tokenizer.encode(text, bos=False) == ids[1:]


def test_ids_outside_the_vocabulary_are_reported():
    with pytest.raises(OpenELMError, match="9999"):
        tokenizer.decode([5, 9999])


def test_a_file_that_is_not_a_tokenizer_is_reported(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"not a model")
    with pytest.raises(OpenELMError, match=r"tokenizer\.model.*SentencePiece"):
        Tokenizer.from_file(path)
    with pytest.raises(OpenELMError, match="Cannot read"):
        Tokenizer.from_file(tmp_path / "missing.model")
