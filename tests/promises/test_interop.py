"""Stock mlx-lm opens our folders, and we open those of mlx-lm."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from models import EVEN, small_tokenizer, weights_of, write_hugging_face, write_pt

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from converters.conversion.run import convert
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import stream
from mlx_openelm.storage.loading import load

pytest.importorskip("torch", reason="needs PyTorch to write .pt files")
pytestmark = pytest.mark.interop

PROMPT = "Once upon a time there was a king"
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(small_tokenizer().model_proto)
    return str(path)


def in_float32(model):
    """Widen and unpack, so that mlx-lm computes as we do on the Linux CPU."""
    from mlx_lm.utils import dequantize_model

    def widen(array):
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(mx.float32) if floating else array

    model.update(tree_map(widen, model.parameters()))
    return dequantize_model(model)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"bits": 4}, {"bits": 8}],
    ids=str,
)
def test_stock_mlx_lm_generates_the_same_tokens(tmp_path, options, tokenizer_file):
    import mlx_lm

    source = write_pt(tmp_path / "even.pt", weights_of(EVEN, seed=3))
    report = convert(source, tmp_path / "out", tokenizer=tokenizer_file, **options)
    theirs, their_tokenizer = mlx_lm.load(str(report.path))
    ours, our_tokenizer = load(str(report.path))
    ids = our_tokenizer.encode(PROMPT)
    assert their_tokenizer.encode(PROMPT) == ids
    tokens = [
        p.token
        for p in stream(ours, our_tokenizer, PROMPT, Sampling(max_tokens=NUM_TOKENS))
    ]
    expected = [
        r.token
        for r in mlx_lm.stream_generate(
            in_float32(theirs), their_tokenizer, ids, max_tokens=NUM_TOKENS
        )
    ]
    assert tokens == expected
    assert len(set(tokens)) > 3
    text = mlx_lm.generate(theirs, their_tokenizer, ids, max_tokens=4)
    assert isinstance(text, str)


@pytest.mark.parametrize("quantize", [False, True])
def test_a_folder_converted_by_mlx_lm_is_read(tmp_path, quantize, tokenizer_file):
    import mlx_lm

    source = write_hugging_face(tmp_path / "source", EVEN, weights_of(EVEN, seed=3))
    from mlx_openelm.storage.tokenizer_finder import write_tokenizer

    write_tokenizer(small_tokenizer(), source)
    mlx_lm.convert(
        str(source),
        str(tmp_path / "theirs"),
        quantize=quantize,
        q_bits=4,
        q_group_size=32,
        dtype="float32",
    )
    (tmp_path / "theirs" / "tokenizer.model").unlink(missing_ok=True)
    ours, tokenizer = load(str(tmp_path / "theirs"))  # from tokenizer.json alone
    theirs, their_tokenizer = mlx_lm.load(str(tmp_path / "theirs"))
    ids = tokenizer.encode(PROMPT)
    assert ids == small_tokenizer().encode(PROMPT) == their_tokenizer.encode(PROMPT)
    expected = np.array(in_float32(theirs)(mx.array([ids])))
    np.testing.assert_allclose(np.array(ours(mx.array([ids]))), expected, atol=1e-4)


def test_our_model_runs_in_the_decode_loop_of_mlx_lm(tmp_path, tokenizer_file):
    from mlx_lm.generate import generate_step

    source = write_pt(tmp_path / "even.pt", weights_of(EVEN, seed=3))
    report = convert(
        source, tmp_path / "out", tokenizer=tokenizer_file, dtype="float32"
    )
    model, tokenizer = load(str(report.path))
    ids = tokenizer.encode(PROMPT)
    theirs = [
        int(token)
        for token, _ in generate_step(mx.array(ids), model, max_tokens=NUM_TOKENS)
    ]
    ours = [
        p.token for p in stream(model, tokenizer, ids, Sampling(max_tokens=NUM_TOKENS))
    ]
    assert ours == theirs


def test_mlx_lm_reads_the_written_config(tmp_path, tokenizer_file):
    source = write_pt(tmp_path / "even.pt", weights_of(EVEN))
    report = convert(source, tmp_path / "out", bits=4, tokenizer=tokenizer_file)
    raw = json.loads((report.path / "config.json").read_text())
    from mlx_lm.models.openelm import ModelArgs

    args = ModelArgs.from_dict(raw)
    assert args.num_query_heads == list(EVEN.num_query_heads)
    assert args.model_type == "openelm"
