"""A damaged tokenizer is one OpenELMError, or works."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from sentencepieces import SIZE, edited, pieces_of, train

from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.tokenizer_finder import (
    PROBES,
    read_tokenizer,
    verify_tokenizer,
)
from mlx_openelm.text.tokenizer import LONGEST_PIECE, Tokenizer
from mlx_openelm.text.tokenizer_json import describe

PROTO = train().model_proto
SPECS = 120  # bytes at the end: settings of the trainer and the normalizer


def use(proto: bytes) -> None:
    """Call everything that reads a tokenizer; only OpenELMError may leave."""
    tokenizer = Tokenizer(proto)
    for text in PROBES:
        tokenizer.decode(tokenizer.encode(text))
    tokenizer.encode_many(PROBES, rendered=True)
    ids = range(tokenizer.vocab_size)
    stream = tokenizer.stream_decoder(after=ids)
    for i in ids:
        tokenizer.piece(i)
        stream.add(i)
    tokenizer.decode(ids)
    describe(tokenizer)
    verify_tokenizer(tokenizer, tokenizer.vocab_size)


def change_byte(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.randrange(256)


def change_specs(data: bytearray, rng: random.Random) -> None:
    data[-rng.randint(1, SPECS)] = rng.randrange(256)


def change_byte_pieces(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(5000)] = rng.randrange(256)


def delete_bytes(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randint(1, 30)]


def repeat_bytes(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.randint(1, 60)]


@pytest.mark.parametrize(
    "mutate",
    [change_byte, change_specs, change_byte_pieces, delete_bytes, repeat_bytes],
)
def test_a_mutated_tokenizer_model_is_one_error_or_works(
    mutate: Callable[[bytearray, random.Random], None],
) -> None:
    rng = random.Random(12)
    errors = []
    for _ in range(150):
        data = bytearray(PROTO)
        mutate(data, rng)
        try:
            use(bytes(data))
        except OpenELMError as error:
            errors.append(str(error))
    assert errors
    assert max(map(len, errors)) < 1000


@pytest.mark.parametrize("place", [b"<0x07>", b"the", b"<s>"])
def test_a_piece_that_is_not_utf8_is_named(place: bytes) -> None:
    data = bytearray(PROTO)
    data[data.index(place)] = 0xBC
    with pytest.raises(OpenELMError, match=r"damaged.*Replace the file"):
        Tokenizer(bytes(data))


def test_a_truncated_tokenizer_model_is_refused() -> None:
    for size in (0, 1, 100, len(PROTO) // 2, len(PROTO) - 1):
        with pytest.raises(OpenELMError):
            Tokenizer(PROTO[:size])


def test_long_pieces_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    fake = pieces_of(PROTO)
    for n in range(20, 4000):
        fake.pieces.add(piece="a" * n, score=-float(n))
    with pytest.raises(OpenELMError, match="piece of 3999 characters"):
        Tokenizer(fake.SerializeToString())

    def edit(file: dict[str, dict[str, dict[str, int]]]) -> None:
        names = [name for name in file["model"]["vocab"] if set(name) != {"a"}]
        names += ["a" * n for n in range(1, 4001)]
        file["model"]["vocab"] = {name: i for i, name in enumerate(names)}

    with pytest.raises(OpenELMError, match="piece of 4000 characters"):
        read_tokenizer(edited(train(), tmp_path, edit))


def test_pieces_of_the_greatest_length_are_accepted() -> None:
    fake = pieces_of(PROTO)
    fake.pieces.add(piece="a" * LONGEST_PIECE, score=-1e6)
    assert Tokenizer(fake.SerializeToString()).vocab_size == SIZE + 1


def test_a_mutated_tokenizer_json_is_one_error_or_works(tmp_path: Path) -> None:
    text = json.dumps(describe(train())).encode()
    rng = random.Random(3)
    settings = text.index(b'"model"')
    file = tmp_path / "tokenizer.json"
    errors = []
    for n in range(60):
        data = bytearray(text)
        data[rng.randrange(settings if n % 2 else len(data))] = rng.randrange(256)
        file.write_bytes(data)
        try:
            use(read_tokenizer(file, num_rows=SIZE + 1).model_proto)
        except OpenELMError as error:
            errors.append(str(error))
    assert errors
    assert max(map(len, errors)) < 1000
