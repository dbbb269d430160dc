from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import UNEVEN, build, small_tokenizer

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation import decoding
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import generate, stream

tokenizer = small_tokenizer()
model = build(UNEVEN)


class Scripted:
    """A model that yields given tokens in turn and ignores its input."""

    def __init__(self, tokens, context=64):
        self.config = replace(UNEVEN, max_context_length=context)
        self.layers = [None]
        self._tokens = iter(tokens)

    def transformer(self, tokens, cache=None):
        return mx.zeros((*tokens.shape, 1))

    def head(self, hidden):
        token = next(self._tokens, 5)
        return 10.0 * (mx.arange(tokenizer.vocab_size) == token)[None]


def stream_text(text, *, eos=True, **options):
    ids = tokenizer.encode(text, bos=False) + ([tokenizer.eos_id] if eos else [])
    return list(stream(Scripted(ids, 4096), tokenizer, [1], Sampling(**options)))


def test_greedy_is_the_argmax_of_the_uncached_model():
    prompt = [1, 7, 20]
    expected = list(prompt)
    for _ in range(20):
        expected.append(int(np.array(model(mx.array([expected])))[0, -1].argmax()))
    ids = [p.token for p in stream(model, tokenizer, prompt, Sampling(max_tokens=20))]
    assert ids == expected[3:]


def test_the_prompts_chunks_do_not_change_the_answer(monkeypatch):
    prompt = tokenizer.encode("Once upon a time there was a king")
    whole = [p.token for p in stream(model, tokenizer, prompt, Sampling(max_tokens=12))]
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 5)
    assert whole == [
        p.token for p in stream(model, tokenizer, prompt, Sampling(max_tokens=12))
    ]


texts = st.text(st.sampled_from("ab \n日\U0001f600é"), min_size=1, max_size=20)


@settings(max_examples=150)
@given(texts, st.lists(st.text("ab \n日", min_size=1, max_size=4), max_size=3))
def test_the_answer_ends_before_the_first_stop_text(text, stops):
    pieces = stream_text(text, stop=tuple(stops), max_tokens=200)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(p.text for p in pieces) == expected
    assert pieces[-1].finish_reason == "stop"
    assert all(p.finish_reason is None for p in pieces[:-1])


@pytest.mark.parametrize("position", range(8))
def test_eos_ends_the_answer_at_any_position(position):
    words = tokenizer.encode("a king and a queen", bos=False)[:8]
    ids = [*words[:position], tokenizer.eos_id, *words]
    pieces = list(stream(Scripted(ids), tokenizer, [1], Sampling(max_tokens=30)))
    assert [p.token for p in pieces] == ids[: position + 1]
    assert "".join(p.text for p in pieces) == tokenizer.decode(words[:position])
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].generation_tokens == position + 1


def test_max_tokens_and_the_context_end_it_with_length():
    assert len(stream_text("a king and a queen", eos=False, max_tokens=3)) == 3
    assert (
        stream_text("a king and a queen", eos=False, max_tokens=3)[-1].finish_reason
        == "length"
    )
    prompt = [1, *[7] * 59]
    pieces = list(stream(model, tokenizer, prompt, Sampling(max_tokens=999)))
    assert len(pieces) == 64 - 60
    assert pieces[-1].finish_reason == "length"


def test_half_a_character_at_the_end_is_kept():
    byte_tokens = [
        tokenizer.processor.PieceToId(f"<0x{b:02X}>") for b in "日".encode()[:2]
    ]
    pieces = list(stream(Scripted(byte_tokens), tokenizer, [1], Sampling(max_tokens=2)))
    assert (
        "".join(p.text for p in pieces)
        == tokenizer.decode(byte_tokens)
        == "\ufffd\ufffd"
    )


def test_a_prompt_that_fills_the_context_is_refused():
    with pytest.raises(OpenELMError, match=r"64 tokens.*context is 64"):
        list(stream(model, tokenizer, [1] * 64))
    with pytest.raises(OpenELMError, match="empty"):
        list(stream(model, tokenizer, []))
    with pytest.raises(OpenELMError, match="invalid token id"):
        list(stream(model, tokenizer, [1, 300]))
    with pytest.raises(OpenELMError, match="invalid token id"):
        list(stream(model, tokenizer, [1, 1.5]))


def test_a_seed_repeats_the_answer_and_another_one_does_not():
    def draw(seed):
        return generate(
            model, tokenizer, "Hi", Sampling(max_tokens=30, temp=1.0, seed=seed)
        )

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_the_penalty_keeps_a_greedy_answer_from_repeating():
    sampling = Sampling(max_tokens=40, repetition_penalty=1e5)
    tokens = [p.token for p in stream(model, tokenizer, [1, 7], sampling)]
    assert len(set(tokens)) == len(tokens)
    plain = [p.token for p in stream(model, tokenizer, [1, 7], Sampling(max_tokens=40))]
    assert len(set(plain)) < len(plain)


def test_the_statistics_are_those_of_the_run():
    pieces = stream_text("a king", max_tokens=50)
    last = pieces[-1]
    assert last.prompt_tokens == 1
    assert last.generation_tokens == len(pieces)
    assert last.time_to_first_token_s > 0
    assert last.prompt_tps == pytest.approx(
        last.prompt_tokens / last.time_to_first_token_s
    )
    assert last.peak_memory_bytes >= 0


def test_the_first_words_space_is_kept_after_a_prompt():
    ids = tokenizer.encode("king", bos=False)
    pieces = list(
        stream(Scripted(ids, 4096), tokenizer, "the", Sampling(max_tokens=len(ids)))
    )
    assert "the" + "".join(p.text for p in pieces) == "the king"
