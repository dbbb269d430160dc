"""Added tokens are encoded and decoded as Hugging Face's tokenizers does."""

import json
import random
from dataclasses import replace
from itertools import product

import pytest
from sentencepieces import SIZE, train
from tokenizers import Tokenizer as HuggingFaceTokenizer

from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.added_tokens import AddedToken, AddedTokens
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.text.tokenizer_json import describe, read_added

PLAIN = train()
TOKENS = (  # several begin alike; one occurs in words
    *("<pad>", "<|user|>", "<|us", "<|end|>", "thest", "日本x", "a b", "[x]"),
)


def extended(tokens: list[AddedToken], **options: bool) -> Tokenizer:
    added = AddedTokens(tokens, roles={"pad_token": "<pad>"}, **options)
    return Tokenizer(PLAIN.model_proto, added=added)


def number(contents: tuple[str, ...], **flags: bool) -> list[AddedToken]:
    return [AddedToken(SIZE + i, text, **flags) for i, text in enumerate(contents)]


def random_text(rng: random.Random) -> str:
    parts = [
        *TOKENS,
        " ",
        "  ",
        "\n",
        "the",
        "st",
        "on",
        "aba",
        ".",
        "é",
        "<",
        "<s",
        "_",
        "1",
    ]
    return "".join(rng.choices(parts, k=rng.randint(0, 9)))


@pytest.mark.parametrize("spaces_each", [True, False])
@pytest.mark.parametrize("flag", ["", "single_word", "lstrip", "rstrip", "normalized"])
def test_any_text_has_hugging_faces_ids_and_text(flag: str, spaces_each: bool) -> None:
    flags = {flag: True} if flag else {}
    tokens = number(TOKENS, **flags)
    tokens = [replace(t, special=i % 2 == 0) for i, t in enumerate(tokens)]
    tokenizer = extended(tokens, spaces_each=spaces_each)
    theirs = HuggingFaceTokenizer.from_str(json.dumps(describe(tokenizer)))
    rng = random.Random(f"{flag} {spaces_each}")
    found = 0
    for _ in range(300):
        text = random_text(rng)
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text).ids, repr(text)
        assert tokenizer.encode_many([text])[0] == ids[1:]
        assert tokenizer.decode(ids) == theirs.decode(ids), repr(text)
        stream = tokenizer.stream_decoder()
        assert "".join(map(stream.add, ids)) + stream.finish() == tokenizer.decode(ids)
        found += sum(id >= SIZE for id in ids)
    assert found > 100


def test_flags_may_be_mixed() -> None:
    names = ("single_word", "lstrip", "rstrip", "normalized")
    rng = random.Random(5)
    for values in product([False, True], repeat=4):
        tokens = number(TOKENS)
        tokens = [
            replace(t, **dict(zip(names, rng.sample(values, 4), strict=True)))
            for t in tokens
        ]
        tokenizer = extended(tokens)
        theirs = HuggingFaceTokenizer.from_str(json.dumps(describe(tokenizer)))
        for _ in range(40):
            text = random_text(rng)
            assert tokenizer.encode(text) == theirs.encode(text).ids, repr(text)


def test_what_is_written_is_read_again() -> None:
    for spaces_each in (True, False):
        tokenizer = extended(number(TOKENS, rstrip=True), spaces_each=spaces_each)
        read, spaces = read_added(json.loads(json.dumps(describe(tokenizer))))
        assert [t for t in read if t.id >= SIZE] == list(tokenizer.added.by_id.values())
        assert spaces == spaces_each


def test_a_special_token_is_left_out_of_the_text() -> None:
    tokenizer = extended([AddedToken(SIZE, "<pad>", special=True)])
    ids = tokenizer.encode("the<pad>the", bos=False)
    assert SIZE in ids
    assert tokenizer.decode(ids) == "the the"
    assert tokenizer.piece(SIZE) == "<pad>"
    assert tokenizer.piece(SIZE + 1) == ""


def test_rendered_templates_keep_their_ends() -> None:
    tokenizer = extended(number(("<|user|>",)))
    ids = tokenizer.encode_rendered("<|user|>the</s>the")
    assert ids == [
        1,
        SIZE,
        *PLAIN.encode("the", bos=False),
        2,
        *PLAIN.encode("the")[1:],
    ]


def test_an_added_token_may_be_the_eos_token() -> None:
    added = AddedTokens(number(("<|end|>",)), roles={"eos_token": "<|end|>"})
    tokenizer = Tokenizer(PLAIN.model_proto, added=added)
    assert tokenizer.eos_id == SIZE
    assert tokenizer.encode_rendered("</s>") == [1, SIZE]


def test_gaps_between_ids_have_no_text() -> None:
    tokenizer = extended([AddedToken(SIZE + 3, "<x>")])
    assert tokenizer.num_ids == SIZE + 4
    assert [tokenizer.has(SIZE + i) for i in range(5)] == [False] * 3 + [True, False]
    stream = tokenizer.stream_decoder(after=[1, SIZE])
    assert [stream.add(i) for i in (SIZE, SIZE + 3, SIZE + 9)] == ["", "<x>", ""]
    with pytest.raises(OpenELMError, match="outside the vocabulary"):
        tokenizer.decode([SIZE])


def test_a_tokenizer_without_added_tokens_is_unchanged() -> None:
    assert not PLAIN.added
    assert PLAIN.num_ids == PLAIN.vocab_size == SIZE


@pytest.mark.parametrize(
    "entry",
    [
        {"id": "5", "content": "x"},
        {"id": True, "content": "x"},
        {"id": 5, "content": ""},
        {"id": 5, "content": None},
        {"id": 5, "content": "\ud800"},
        {"content": "x"},
        [],
    ],
)
def test_an_entry_of_another_structure_is_refused(entry: dict[str, object]) -> None:
    with pytest.raises((LookupError, TypeError, ValueError)):
        AddedToken.read(entry)
