"""Fine-tunes with a resized embedding and added tokens are converted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import SCALED, small_tokenizer, weights_of, write_hugging_face

from converters.conversion.run import convert
from converters.conversion.verification import verify
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import generate
from mlx_openelm.storage.inspection import inspect
from mlx_openelm.storage.loading import load
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.storage.tokenizer_finder import write_tokenizer
from mlx_openelm.text.added_tokens import AddedToken, AddedTokens
from mlx_openelm.text.tokenizer import Tokenizer

PIECES = 300
PROTO = small_tokenizer(PIECES).model_proto
ADDED = AddedTokens(
    [
        AddedToken(PIECES, "<pad>", special=True),
        AddedToken(PIECES + 1, "<|end|>", special=True),
    ],
    roles={"pad_token": "<pad>", "eos_token": "<|end|>"},
)


def write_source(folder: Path, rows: int, *, pad: float = 0.0) -> Path:
    """Write a model of `rows` rows without a tokenizer; those after 301 hold `pad`."""
    config = replace(SCALED, vocab_size=rows)
    weights = weights_of(config)
    weights["token_embeddings.weight"][PIECES + 2 :] = pad
    return write_hugging_face(folder, config, weights)


def put_json(folder: Path) -> None:
    write_tokenizer(Tokenizer(PROTO, added=ADDED), folder)
    (folder / "tokenizer.model").unlink()


def put_both(folder: Path) -> None:
    write_tokenizer(Tokenizer(PROTO, added=ADDED), folder)


def put_old_files(folder: Path) -> None:
    ids = {token.content: id for id, token in ADDED.by_id.items()}
    (folder / "tokenizer.model").write_bytes(PROTO)
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    (folder / "special_tokens_map.json").write_text(json.dumps(ADDED.roles))


@pytest.mark.parametrize("put", [put_json, put_both, put_old_files])
@pytest.mark.parametrize("to", ["mlx", "hf"])
@pytest.mark.parametrize("rows", [PIECES + 2, PIECES + 4, 384])
def test_added_tokens_and_their_rows_are_kept(
    tmp_path: Path, put: Any, to: str, rows: int
) -> None:
    source, target = write_source(tmp_path / "source", rows, pad=9.0), tmp_path / "out"
    put(source)
    convert(source, target, to=to, dtype="float32", offline=True)
    folder = open_folder(target)
    assert folder.config.vocab_size == PIECES + 2
    assert verify(target, against=[str(source)]).passed
    assert inspect(target).tokenizer == PIECES + 2
    config = json.loads((target / "config.json").read_text())
    assert config["eos_token_id"] == PIECES + 1
    model, tokenizer = load(str(target))
    assert tokenizer.added == ADDED
    assert tokenizer.eos_id == PIECES + 1
    ids = tokenizer.encode("Once<|end|>")
    assert ids[-1] == PIECES + 1
    assert model(mx.array([ids])).shape[-1] == PIECES + 2
    before, theirs = load(str(source))
    sampling = Sampling(max_tokens=12)
    text = generate(model, tokenizer, "Once upon", sampling)
    assert generate(before, theirs, "Once upon", sampling) == text


def test_rows_without_a_token_are_cut(tmp_path: Path) -> None:
    source, target = write_source(tmp_path / "source", PIECES + 1), tmp_path / "out"
    (source / "tokenizer.model").write_bytes(PROTO)
    report = convert(source, target, dtype="float32", offline=True)
    assert "Cut the embedding from 301 to 300 rows" in " ".join(report.notes)
    weights = open_folder(target).read()["transformer.token_embeddings.weight"]
    expected = weights_of(replace(SCALED, vocab_size=PIECES + 1))
    assert np.array_equal(
        np.array(weights), expected["token_embeddings.weight"][:PIECES]
    )
    assert verify(target, against=[str(source)]).passed


def test_a_given_tokenizer_leads_out_of_the_error_for_a_missing_one(
    tmp_path: Path,
) -> None:
    source = write_source(tmp_path / "models" / "source", PIECES + 2)
    given = tmp_path / "given"
    given.mkdir()
    put_old_files(given)
    with pytest.raises(OpenELMError, match="Convert with `tokenizer` FILE"):
        convert(source, tmp_path / "out", offline=True)
    for n, name in enumerate((given, given / "tokenizer.model")):
        convert(source, tmp_path / f"out{n}", tokenizer=str(name), offline=True)
        assert load(str(tmp_path / f"out{n}"))[1].added == ADDED


def test_gguf_has_the_added_tokens(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = write_source(tmp_path / "source", PIECES + 4)
    put_both(source)
    target = tmp_path / "out.gguf"
    convert(source, target, to="gguf", offline=True)
    fields = gguf.GGUFReader(target).fields
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == PIECES + 2
    assert bytes(tokens.parts[tokens.data[-1]]) == b"<|end|>"
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[-2:] == [gguf.TokenType.CONTROL] * 2
    assert fields["tokenizer.ggml.eos_token_id"].contents() == PIECES + 1


def test_inspect_names_a_damaged_tokenizer(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", PIECES)
    assert inspect(source).tokenizer is None
    (source / "tokenizer.model").write_bytes(PROTO.replace(b"<0x07>", b"\xbc0x07>"))
    with pytest.raises(OpenELMError, match="damaged"):
        inspect(source)
