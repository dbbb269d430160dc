"""Log-probabilities in responses are the model's own."""

import json
import math

import mlx.core as mx
import pytest
from servers import complete, post, request, send

from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import generate, stream


def reference(small, prompt, count):
    """Greedy tokens and every token's log-probabilities, from whole passes."""
    model, tokenizer = small
    ids = tokenizer.encode(prompt)
    rows = []
    for _ in range(count):
        logits = model(mx.array([ids]))[0, -1]
        rows.append((logits - mx.logsumexp(logits)).tolist())
        ids.append(max(range(len(rows[-1])), key=rows[-1].__getitem__))
    return ids[-count:], rows


def test_logprobs_are_the_models(client, small):
    tokens, rows = reference(small, "The king", 6)
    whole = complete(client, "The king", max_tokens=6, logprobs=3).choices[0]
    found = whole.logprobs
    assert found.token_logprobs == pytest.approx(
        [row[token] for token, row in zip(tokens, rows, strict=True)], abs=1e-4
    )
    for row, top in zip(rows, found.top_logprobs, strict=True):
        best = sorted(row, reverse=True)[:3]
        assert list(top.values()) == pytest.approx(best, abs=1e-4)
    streamed = [
        chunk.choices[0]
        for chunk in complete(client, "The king", max_tokens=6, logprobs=3, stream=True)
    ]
    assert [t for c in streamed for t in c.logprobs.tokens] == found.tokens
    offsets = [offset for c in streamed for offset in c.logprobs.text_offset]
    assert offsets == found.text_offset
    assert all(0 <= offset <= len(whole.text) for offset in found.text_offset)
    assert complete(client, "a", max_tokens=2).choices[0].logprobs is None


def test_a_chats_logprobs_spell_the_answer_in_bytes(client):
    options = {"logprobs": True, "top_logprobs": 2, "max_tokens": 20}
    messages = [{"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, **options)
    content = answer.choices[0].logprobs.content
    spelled = b"".join(bytes(token.bytes) for token in content)
    text = answer.choices[0].message.content
    assert spelled.decode(errors="replace").count("\ufffd") <= text.count("\ufffd")
    assert [len(token.top_logprobs) for token in content] == [2] * len(content)
    assert all(math.exp(token.logprob) <= 1 for token in content)
    best = [token.top_logprobs[0].logprob for token in content]
    assert best == pytest.approx([token.logprob for token in content])  # greedy


def test_banned_tokens_leave_the_json_whole(server):
    bias = {str(id): -1e6 for id in range(3, 299)}
    body = {"prompt": "a", "max_tokens": 2, "logprobs": 20, "logit_bias": bias}
    data = request(server.url, "/v1/completions", {**body, "min_tokens": 2})
    status, _, answer = send(server.url, data)
    assert (status, b"Infinity" in answer) == (200, False)
    found = json.loads(answer)["choices"][0]["logprobs"]["top_logprobs"]
    assert all(value > -100 for others in found for value in others.values())


def test_logprobs_do_not_depend_on_bias_and_penalties(client, small):
    options = {"logit_bias": {"40": 3, "41": -3}, "temperature": 0, "max_tokens": 8}
    extra = {"repetition_penalty": 1.3}
    whole = complete(client, "The king", extra_body=extra, logprobs=2, **options)
    sampling = Sampling(
        max_tokens=8,
        repetition_penalty=1.3,
        logit_bias=((40, 3.0), (41, -3.0)),
        logprobs=2,
    )
    pieces = list(stream(*small, "The king", sampling, template="raw"))
    assert whole.choices[0].text == "".join(piece.text for piece in pieces)
    own = [piece.logprob for piece in pieces]
    found = whole.choices[0].logprobs.token_logprobs
    assert found == pytest.approx(own[: len(found)], abs=1e-4)


def check_offsets(choice, tokenizer):
    """Check that each token is in the text where its offset is."""
    text, found = choice["text"], choice["logprobs"]
    offsets = found["text_offset"]
    assert offsets == sorted(offsets)
    for number, (token, offset) in enumerate(
        zip(found["tokens"], offsets, strict=True)
    ):
        assert 0 <= offset <= len(text)
        if token.startswith("bytes:"):
            first = int(token[-2:], 16)
            continues = 0x80 <= first < 0xC0
            if continues and text[offset] != "\ufffd":
                assert offset == offsets[number - 1]  # with the character's first
        elif token not in ("<s>", "</s>"):
            begins = offset == 0 and not text.startswith(token)
            token = token.removeprefix(" ") if begins else token
            assert text[offset : offset + len(token)] == token


@pytest.mark.parametrize("echo", [True, False])
@pytest.mark.parametrize("prompt", ["The king said: 日本語, naïve", [5, 260, 9, 31]])
def test_offsets_are_the_places_of_the_tokens(server, small, echo, prompt):
    body = {"prompt": prompt, "echo": echo, "logprobs": 1, "max_tokens": 60}
    for temperature in (0, 1, 2):
        options = {"temperature": temperature, "seed": 3, "logit_bias": {"2": -99}}
        _, answer = post(server.url, body | options)
        check_offsets(answer["choices"][0], small[1])


def test_tokens_of_a_stop_text_have_no_log_probabilities(server, small):
    body = {"prompt": "a", "regex": "日本(ab){3}c", "max_tokens": 60, "logprobs": 1}
    _, answer = post(server.url, body | {"stop": "bab"})
    (choice,) = answer["choices"]
    assert choice["text"] == "日本a"
    check_offsets(choice, small[1])
    assert choice["logprobs"]["text_offset"][-1] == 2


# Echo ----------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("prompt", ["", "The king", "日本語, naïve", [5], [9, 7, 31]])
def test_echo_scores_the_prompt(server, small, prompt, max_tokens):
    model, tokenizer = small
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    body = {"prompt": prompt, "echo": True, "max_tokens": max_tokens, "logprobs": 2}
    status, answer = post(server.url, body)
    assert status == 200
    (choice,) = answer["choices"]
    expected = generate(model, tokenizer, ids, Sampling(max_tokens=3))
    text = prompt if isinstance(prompt, str) else None
    if text is not None:
        assert choice["text"] == text + (expected if max_tokens else "")
    found = choice["logprobs"]["token_logprobs"]
    assert found[0] is None  # nothing comes before the first token
    logits = model(mx.array([ids]))[0]
    rows = (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).tolist()
    scores = [row[token] for row, token in zip(rows, ids[1:], strict=False)]
    assert found[1 : len(ids)] == pytest.approx(scores, abs=1e-4)
    best = choice["logprobs"]["top_logprobs"] or [None]
    for row, top in zip(rows, best[1:], strict=False):
        assert max(top.values()) == pytest.approx(max(row), abs=1e-4)
    assert answer["usage"]["completion_tokens"] == max_tokens
    assert len(choice["logprobs"]["tokens"]) == len(found)
    if not max_tokens:
        assert (len(found), choice["finish_reason"]) == (len(ids), "length")


def test_echo_of_several_prompts_and_without_scores(server):
    body = {"prompt": ["a", "The king"], "echo": True, "max_tokens": 0}
    status, answer = post(server.url, body)
    assert status == 200
    assert [choice["text"] for choice in answer["choices"]] == ["a", "The king"]
    assert [choice["logprobs"] for choice in answer["choices"]] == [None, None]
    status, answer = post(server.url, {"prompt": "a", "max_tokens": 0})
    assert status == 400


def test_scores_do_not_depend_on_kept_prompts(server):
    body = {"prompt": "x" * 99, "echo": True, "max_tokens": 0, "logprobs": 1}
    post(server.url, {"prompt": "x" * 99, "max_tokens": 1})
    first = post(server.url, body)[1]["choices"]
    assert post(server.url, body)[1]["choices"] == first
    assert len(first[0]["logprobs"]["tokens"]) > 90
