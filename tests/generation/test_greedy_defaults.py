"""A given temperature of 0 takes no penalty from generation_config.json."""

import json

import pytest
from commands import call
from models import EVEN, small_tokenizer, weights_of, write_pt

from converters.conversion.run import convert
from mlx_openelm.generation.options import Sampling
from mlx_openelm.serving.server import Server

PENALTIES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
PROMPT = "Once upon a time there was a king"


@pytest.mark.parametrize("sampled", [False, True])
def test_a_given_temperature_of_zero_takes_no_penalty(sampled):
    config = {"do_sample": sampled, "temperature": 0.7, **PENALTIES}
    actual = Sampling.from_defaults(config, {"temp": 0})
    assert (actual.repetition_penalty, actual.no_repeat_ngram) == (1.0, 0)


@pytest.mark.parametrize("given", [{}, {"temp": None}, {"temp": 0.5}])
def test_the_penalties_apply_without_it(given):
    actual = Sampling.from_defaults(PENALTIES, given)
    assert (actual.repetition_penalty, actual.no_repeat_ngram) == (1.3, 2)


def test_given_penalties_are_kept():
    given = {"temp": 0.0, "repetition_penalty": 1.2, "no_repeat_ngram": 3}
    actual = Sampling.from_defaults(PENALTIES, given)
    assert (actual.repetition_penalty, actual.no_repeat_ngram) == (1.2, 3)


def test_a_request_with_temperature_zero_takes_no_penalty(monkeypatch):
    served = []
    monkeypatch.setattr(Server, "run", lambda self, **_: served.append(self._served))
    for options in ((), ("--repetition-penalty", 1.25)):
        assert call("serve", "--port", 0, "--quiet", *options).exit_code == 0
    penalties = [
        [one.sampling(requested) for requested in ({}, {"temp": 0}, {"temp": 0.4})]
        for one in served
    ]
    assert [[s.repetition_penalty for s in row] for row in penalties] == [
        [1.15, 1.0, 1.15],  # of the demo's generation_config.json
        [1.25, 1.25, 1.25],  # of the command
    ]


@pytest.mark.interop
def test_greedy_text_is_that_of_stock_mlx_lm(tmp_path):
    pytest.importorskip("torch", reason="needs PyTorch to write .pt files")
    import mlx_lm

    source = write_pt(tmp_path / "even.pt", weights_of(EVEN, seed=3))
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(small_tokenizer().model_proto)
    folder = convert(
        source, tmp_path / "out", tokenizer=str(tokenizer), dtype="float32"
    ).path
    (folder / "generation_config.json").write_text(json.dumps(PENALTIES))
    model, their_tokenizer = mlx_lm.load(str(folder))
    expected = [
        response.token
        for response in mlx_lm.stream_generate(
            model, their_tokenizer, their_tokenizer.encode(PROMPT), max_tokens=24
        )
    ]
    arguments = ("generate", PROMPT, "--model", folder, "-m", 24, "--json", "--quiet")
    assert json.loads(call(*arguments, "--temp", 0).stdout)["tokens"] == expected
    assert json.loads(call(*arguments).stdout)["tokens"] != expected
