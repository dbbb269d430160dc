"""The server: OpenAI's own client asks it, and whoever means it ill."""

import inspect
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import pytest
from commands import expect_error
from models import (
    UNEVEN,
    build,
    make_factors,
    small_tokenizer,
    weights_of,
    write_mlx_lm_adapter,
)
from places import ROOT
from servers import (
    GREEDY,
    connect,
    events,
    parse,
    post,
    read_all,
    request,
    send,
    serving,
)

from mlx_openelm.generation.conversation import Conversation
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import generate, stream
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.serving.requests import MOST_BYTES, Served, read_completion
from mlx_openelm.storage.hub import demo_folder
from mlx_openelm.storage.loading import load
from mlx_openelm.storage.model_folder import open_folder

pytestmark = pytest.mark.interop

CONTEXT = 512
PROMPTS = ("Once upon a time", "The king", " a", "日本語, naïve", "I\n\n", "x" * 90)


@pytest.fixture(scope="module")
def small():
    """A made model whose answers are mostly pieces of characters, and its tokenizer."""
    config = replace(UNEVEN, max_context_length=CONTEXT)
    return build(config, seed=4), small_tokenizer()


@pytest.fixture(scope="module")
def server(small):
    with serving(*small, template="instruct") as started:
        yield started


@pytest.fixture(scope="module")
def openai():
    return pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(openai, server):
    return client_of(openai, server)


def client_of(openai, server, key="no key"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def complete(client, prompt, **options):
    return client.completions.create(model="tiny", prompt=prompt, **options)


def usage_of(model, tokenizer, prompt, sampling):
    *_, last = stream(model, tokenizer, prompt, sampling, template="raw")
    return last.finish_reason, last.prompt_tokens, last.generation_tokens


# The same answers as everywhere ---------------------------------------------------


def test_greedy_completions_are_those_of_generate(client, small):
    with ThreadPoolExecutor(len(PROMPTS)) as pool:  # in one batch
        answers = list(pool.map(lambda prompt: complete(client, prompt), PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = generate(*small, prompt, GREEDY, template="raw")
        assert answer.choices[0].text == expected
        usage = answer.usage
        found = answer.choices[0].finish_reason, usage.prompt_tokens
        told = (*found, usage.completion_tokens)
        assert told == usage_of(*small, prompt, GREEDY)
        assert answer.model == "tiny"
    assert len({answer.choices[0].text for answer in answers}) == len(PROMPTS)


@pytest.mark.parametrize(
    "asked",
    [
        Sampling(max_tokens=40, temp=1.5, seed=11),
        Sampling(max_tokens=40, temp=0.9, top_p=0.9, top_k=40, min_p=0.01, seed=3),
        Sampling(max_tokens=40, repetition_penalty=1.3),
        Sampling(max_tokens=40, repetition_penalty=1.3, repetition_context=4),
        Sampling(max_tokens=30, min_tokens=25, logit_bias=((2, 6.0),)),
        Sampling(max_tokens=30, no_repeat_ngram=2),
    ],
    ids=str,
)
def test_drawn_completions_are_those_of_generate(client, small, asked):
    options = {
        "top_k": asked.top_k,
        "min_p": asked.min_p,
        "min_tokens": asked.min_tokens,
        "repetition_penalty": asked.repetition_penalty,
        "repetition_context_size": asked.repetition_context,
        "no_repeat_ngram_size": asked.no_repeat_ngram,
    }
    for prompt in PROMPTS[:3]:
        answer = complete(
            client,
            prompt,
            max_tokens=asked.max_tokens,
            temperature=asked.temp,
            top_p=asked.top_p,
            seed=asked.seed,
            logit_bias={str(id): bias for id, bias in asked.logit_bias},
            extra_body=options,
        )
        assert answer.choices[0].text == generate(*small, prompt, asked, template="raw")


def test_a_stream_joined_is_the_whole(client, small):
    for prompt in PROMPTS:
        chunks = list(
            complete(
                client, prompt, stream=True, stream_options={"include_usage": True}
            )
        )
        *parts, counts = chunks
        whole = complete(client, prompt)
        texts = [part.choices[0].text for part in parts]
        assert "".join(texts) == whole.choices[0].text
        assert [p.choices[0].finish_reason for p in parts[:-1]] == [None] * (
            len(parts) - 1
        )
        assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert counts.usage.completion_tokens == whole.usage.completion_tokens
        assert counts.usage.prompt_tokens == whole.usage.prompt_tokens


def test_characters_that_come_in_bytes_are_whole_in_a_stream(client, small):
    options = {"temperature": 1.0, "max_tokens": 200, "seed": 5}
    # Nothing but the bytes of these characters, and EOS banned.
    processor = small[1].processor
    names = [f"<0x{byte:02X}>" for byte in "日本é".encode()]
    bias = {str(processor.PieceToId(name)): 100.0 for name in names}
    chunks = [
        c.choices[0].text
        for c in complete(client, "a", stream=True, logit_bias=bias, **options)
    ]
    assert (
        "".join(chunks)
        == complete(client, "a", logit_bias=bias, **options).choices[0].text
    )
    whole = [c for c in "".join(chunks) if c not in "\ufffd"]
    assert whole
    assert set(whole) <= set("日本é") | {chr(n) for n in range(0x80, 0x10000)}


def space_of(tokenizer):
    """The id of a piece that begins with a space."""
    pieces = map(tokenizer.processor.IdToPiece, range(tokenizer.vocab_size))
    return next(id for id, piece in enumerate(pieces) if piece[:1] == "▁" != piece)


def test_a_leading_space_is_kept(client, small):
    tokenizer = small[1]
    bias = {str(space_of(tokenizer)): 100}
    answer = complete(client, "a", max_tokens=1, logit_bias=bias)
    assert answer.choices[0].text.startswith(" ")
    stop = answer.choices[0].text * 3  # of its tokens nothing is told
    options = {"logit_bias": bias, "logprobs": 0, "stop": stop}
    answer = complete(client, "a", max_tokens=9, **options)
    assert (answer.choices[0].text, answer.choices[0].logprobs.tokens) == ("", [])
    assert answer.usage.completion_tokens == 3


def test_stop_texts_end_where_generate_ends(client, small):
    expected = generate(*small, "The king", GREEDY, template="raw")
    for start in range(0, len(expected) - 3, 3):
        stop = expected[start : start + 3]
        answer = complete(client, "The king", stop=[stop, "never said"])
        asked = replace(GREEDY, stop=(stop, "never said"))
        assert answer.choices[0].text == generate(
            *small, "The king", asked, template="raw"
        )
        assert answer.choices[0].finish_reason == "stop"
        streamed = complete(client, "The king", stop=stop, stream=True)
        assert "".join(c.choices[0].text for c in streamed) == answer.choices[0].text


def test_a_prompt_may_be_ids(client, small):
    ids = small[1].encode("The king")
    by_ids = complete(client, ids).choices[0].text
    assert by_ids == complete(client, ["The king"]).choices[0].text
    assert by_ids == generate(*small, "The king", GREEDY, template="raw")


def test_what_was_answered_can_be_gone_on_with(client, small):
    # The prompt is, token for token, what mlx-lm's prompt cache has kept.
    tokenizer, ids = small[1], small[1].encode("Go on")
    for _ in range(4):
        pieces = list(stream(*small, ids, replace(GREEDY, max_tokens=5)))
        assert complete(client, ids, max_tokens=5).choices[0].text == "".join(
            piece.text for piece in pieces
        )
        ids = [*ids, *(p.token for p in pieces if p.token != tokenizer.eos_id)]
    assert complete(client, ids, max_tokens=5).usage.prompt_tokens_details.cached_tokens


def test_chats_are_those_of_chat(client, small):
    said = ("Who are you?", "And?\n", "日本 </s> x")
    with_system = Conversation(*small, GREEDY, template="instruct", system="Be kind.")
    plain = Conversation(*small, GREEDY, template="instruct")
    for conversation in (plain, with_system):
        messages = [{"role": "system", "content": conversation.system}]
        messages = messages if conversation.system else []
        for text in said[: 2 if conversation.system else 3]:
            messages.append(
                {"role": "user", "content": [{"type": "text", "text": text}]}
            )
            answer = client.chat.completions.create(model="tiny", messages=messages)
            expected = "".join(piece.text for piece in conversation.reply(text))
            assert (answer.choices[0].message.content or "") == expected
            streamed = client.chat.completions.create(
                model="tiny", messages=messages, stream=True
            )
            deltas = [c.choices[0].delta.content or "" for c in streamed]
            assert "".join(deltas) == expected
            messages.append({"role": "assistant", "content": expected})
        assert not conversation.omitted_pairs


def test_a_model_without_a_template_goes_on_with_one_text(openai, small):
    with serving(*small) as server:
        answer = client_of(openai, server).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "The king"}]
        )
        expected = generate(*small, "The king", GREEDY, template="raw")
        assert answer.choices[0].message.content == expected


def test_a_space_that_the_template_ends_in_is_no_part_of_the_answer(openai, small):
    space = space_of(small[1])
    asked = Sampling(max_tokens=3, logit_bias=((space, 100.0),))
    conversation = Conversation(*small, asked, template="openelm-peft")
    expected = "".join(piece.text for piece in conversation.reply("Hi"))
    assert not expected.startswith(" ")
    with serving(*small, template="openelm-peft") as server:
        answer = client_of(openai, server).chat.completions.create(
            model="tiny",
            messages=[USER],
            max_tokens=3,
            logit_bias={str(space): 100},
        )
    assert answer.choices[0].message.content == expected


def test_an_answer_that_spells_the_end_ends(small):
    served = Served("tiny", small[1], GREEDY, "instruct", CONTEXT, 300)
    body = {"messages": [USER], "stop": "x"}
    found = read_completion(body, served, chat=True).sampling.stop
    assert found == ("x", "</s>")
    assert read_completion({"prompt": "a"}, served, chat=False).sampling.stop == ()


# Log-probabilities ----------------------------------------------------------------


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
        c.choices[0]
        for c in complete(client, "The king", max_tokens=6, logprobs=3, stream=True)
    ]
    joined = [t for c in streamed for t in c.logprobs.tokens]
    assert joined == found.tokens
    assert [o for c in streamed for o in c.logprobs.text_offset] == found.text_offset
    assert all(0 <= o <= len(whole.text) for o in found.text_offset)
    assert complete(client, "a", max_tokens=2).choices[0].logprobs is None


def test_a_chats_logprobs_spell_the_answer_in_bytes(client):
    options = {"logprobs": True, "top_logprobs": 2, "max_tokens": 20}
    messages = [{"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, **options)
    content = answer.choices[0].logprobs.content
    spelled = b"".join(bytes(token.bytes) for token in content)
    said = answer.choices[0].message.content
    assert spelled.decode(errors="replace").count("\ufffd") <= said.count("\ufffd")
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
    told = json.loads(answer)["choices"][0]["logprobs"]["top_logprobs"]
    assert all(value > -100 for others in told for value in others.values())


def test_logprobs_are_the_models_own_whatever_is_asked(client, small):
    asked = {"logit_bias": {"40": 3, "41": -3}, "temperature": 0, "max_tokens": 8}
    extra = {"repetition_penalty": 1.3}
    whole = complete(client, "The king", extra_body=extra, logprobs=2, **asked)
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


# Models and keys ------------------------------------------------------------------


def test_the_model_is_listed_without_any_hub_cache(openai, client):
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("tiny").id == "tiny"
    assert (model.context_length, model.template) == (CONTEXT, "instruct")
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.models.retrieve("other")


@pytest.mark.parametrize("name", ["gpt-4", "/etc", "apple/OpenELM-270M", "../demo"])
def test_nothing_is_loaded_that_a_client_names(openai, client, name):
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.completions.create(model=name, prompt="Hi")
    for field in ("adapters", "draft_model"):
        with pytest.raises(openai.BadRequestError, match=field):
            complete(client, "Hi", extra_body={field: name})


def test_a_key_is_wanted_of_everything_but_the_page_and_the_health(openai, small):
    with serving(*small, api_key="sésame") as server:
        url = server.url
        for key in ("wrong", "s\u00e9same!", ""):
            headers = {"Authorization": f"Bearer {key}"}
            status, answer = post(url, {"prompt": "a"}, **headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError, match="API key"):
            client_of(openai, server, "wrong").models.list()
        assert post(url, {"prompt": "a"})[0] == 401
        assert post(url, {"prompt": "a"}, Authorization="Basic sésame")[0] == 401
        for path in ("/", "/health"):
            assert send(url, request(url, path, method="GET"))[0] == 200
        data = request(url, "/v1/models", method="GET", Authorization="Bearer sésame")
        assert send(url, data)[0] == 200


# Bad requests -----------------------------------------------------------------------


def healthy(url):
    status, _, body = send(url, request(url, "/health", method="GET"))
    assert (status, json.loads(body)) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": None}, "prompt must be"),
        ({"prompt": {}}, "prompt must be"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": ["a", "b"]}, "prompt must be one"),
        ({"prompt": [1, 2.5]}, "prompt must be one"),
        ({"prompt": [1, 300]}, "not in 0 to 299"),
        ({"prompt": [-1]}, "not in 0 to 299"),
        ({"prompt": "\ud800"}, "UTF-8"),
        ({"prompt": "x " * 1_000_000}, "and the model's context is 512"),
        ({"prompt": [5] * 1_000_000}, "has 1000000 tokens"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": "9"}, "max_tokens is '9'"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "hot" * 10**5}, "temperature is not"),
        ({"temperature": 1e999}, "not JSON"),
        ({"temperature": [[]]}, "temperature is"),
        ({"top_p": 2}, "top_p is 2"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 2}, "min_p is 2"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**70}, "seed is"),
        ({"repetition_penalty": -1}, "repetition_penalty is -1"),
        ({"presence_penalty": 9}, "presence_penalty must be"),
        ({"frequency_penalty": "x"}, "frequency_penalty must be"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"logprobs": "x"}, "logprobs is 'x'"),
        ({"logit_bias": {"300": 1}}, "0 to 299"),
        ({"logit_bias": {"a": 1}}, "logit_bias must be"),
        ({"logit_bias": [1]}, "logit_bias must be"),
        ({"logit_bias": {"1": None}}, "logit_bias is"),
        ({"stop": ""}, None),
        ({"stop": [""]}, "stop must be"),
        ({"stop": [1]}, "stop must be"),
        ({"stop": ["a"] * 17}, "stop must be"),
        ({"stop": 5}, "stop must be"),
        ({"stream": "yes"}, "stream must be"),
        ({"stream": True, "stream_options": 3}, "stream_options must be"),
        ({"n": 2}, "n is 2"),
        ({"best_of": 4}, "best_of is 4"),
        ({"echo": True}, "echo is True"),
        ({"suffix": "x"}, "suffix is 'x'"),
        ({"model": ["x"]}, "No model is called"),
        ({"something": "else", "user": "me", "top_k": 10**9}, None),
    ],
    ids=str,
)
def test_a_bad_field_is_named(server, change, says):
    body = json.dumps({"prompt": "a", "max_tokens": 2} | change).encode()
    status, answer = post(server.url, body)
    if says is None:
        assert status == 200
        return
    assert status in (400, 404)
    message = answer["error"]["message"]
    assert says in message
    assert message.endswith(".")
    assert len(message) < 400
    assert answer["error"]["type"] == "invalid_request_error"


USER = {"role": "user", "content": "Hi"}
PICTURE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": None}, "messages must be a list"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": ["Hi"]}, "messages[0] must be"),
        ({"messages": [{"role": "user"}]}, "messages[0].content must be"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": ["x"], "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, "must be text"),
        ({"messages": [{"role": "user", "content": [5]}]}, "must be text"),
        ({"messages": [USER, USER]}, "in turn"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "in turn"),
        ({"messages": [{"role": "system", "content": "x"}]}, "in turn"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "in turn"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "UTF-8"),
        ({"messages": [{"role": "user", "content": "long " * 800}]}, "shorten"),
        ({"tools": [{"type": "function"}]}, "tools is"),
        ({"response_format": {"type": "json_object"}}, "response_format is"),
        ({"logprobs": 5}, "logprobs must be true or false"),
        ({"top_logprobs": 5}, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs is 50"),
        ({"tools": [], "n": 1, "response_format": {"type": "text"}}, None),
    ],
    ids=str,
)
def test_a_bad_chat_is_named(server, change, says):
    body = json.dumps({"messages": [USER], "max_tokens": 2} | change).encode()
    status, answer = post(server.url, body, "/v1/chat/completions")
    assert status == (200 if says is None else 400)
    assert says is None or says in answer["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b'"x"', b"\xff\xfe\xfd", b"[" * 10**6, b'{"prompt": NaN}'],
    ids=lambda body: repr(body[:10]),
)
def test_what_is_no_json_is_refused(server, body):
    status, answer = post(server.url, body)
    assert status in (400, 411)
    assert "JSON" in answer["error"]["message"]
    healthy(server.url)


CHUNKS = b"5\r\nhello\r\nzz\r\nnonsense"


@pytest.mark.parametrize(
    ("lines", "rest", "status"),
    [
        ("POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999", b"{}", 413),
        (f"POST /v1/completions HTTP/1.1\r\nContent-Length: {'9' * 5000}", b"", 413),
        ("POST /v1/completions HTTP/1.1\r\nContent-Length: -5", b"{}", 400),
        ("POST /v1/completions HTTP/1.1\r\nContent-Length: ²", b"{}", 400),
        ("POST /v1/completions HTTP/1.1\r\nContent-Length: ", b"{}", 411),
        ("POST /v1/completions HTTP/1.1", b"", 411),
        ("POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked", CHUNKS, 411),
        ("POST / HTTP/1.1\r\nContent-Length: 2", b"{}", 404),
        ("POST /v1/../etc HTTP/1.1\r\nContent-Length: 2", b"{}", 404),
        ("GET /serving.html HTTP/1.1", b"", 404),
        ("GET /v1/completions HTTP/1.1", b"", 404),
        ("GET //[ HTTP/1.1", b"", 404),
        ("GET http://[bad/ HTTP/1.1", b"", 400),
        ("DELETE /v1/models HTTP/1.1", b"", 501),
        ("GET / HTTP/9.9", b"", 505),
        ("\x00\x01\x02", b"", 400),
        (f"GET /{'a' * 70000} HTTP/1.1", b"", 414),
        ("GET / HTTP/1.1" + "\r\nA: b" * 200, b"", 431),
    ],
    ids=lambda value: str(value)[:60],
)
def test_nonsense_is_answered_in_json(server, lines, rest, status):
    host = "" if lines.startswith("\x00") else f"\r\nHost: {server.url[7:]}"
    data = f"{lines}{host}\r\n\r\n".encode() + rest
    found, headers, body = send(server.url, data, half_close=True)
    assert found == status
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["error"]["message"].endswith(".")
    healthy(server.url)


def test_a_refused_body_is_read_so_that_the_refusal_arrives(server):
    body = b"x" * (MOST_BYTES + 1)
    status, answer = post(server.url, body)
    assert (status, answer["error"]["code"]) == (413, "too_large")


def test_a_client_that_breaks_off_its_request_is_let_go(server, monkeypatch):
    from mlx_openelm.serving.handler import Handler

    data = request(server.url, "/v1/completions", b'{"pro', Content_Length="500")
    with connect(server.url) as connection:
        connection.sendall(data)
    monkeypatch.setattr(Handler, "timeout", 0.2)
    status, answer = parse_json(send(server.url, data))
    assert (status, "in time" in answer["error"]["message"]) == (408, True)
    healthy(server.url)


def parse_json(answer):
    status, _, body = answer
    return status, json.loads(body)


def test_the_answer_ends_where_the_context_does(openai, client, small):
    ids = [5, *small[1].encode("x" * 600)][: CONTEXT - 3]
    bias = {"2": -100}
    answer = complete(client, ids, max_tokens=2000, logit_bias=bias)
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(
        openai.BadRequestError, match="512 tokens, and the model's"
    ) as e:
        complete(client, [5] * CONTEXT)
    assert e.value.code == "context_length_exceeded"


# Other people's pages -------------------------------------------------------------


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://{host}", "x"]
)
def test_a_page_of_another_origin_is_refused(server, origin):
    host = server.url.removeprefix("http://")
    origin = origin.format(host=host) if "{" not in origin else "https://localhost"
    for method, path in (
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("OPTIONS", "/v1/completions"),
        ("GET", "/"),
    ):
        body = {"prompt": "a"} if method == "POST" else None
        data = request(server.url, path, body, method, Origin=origin)
        status, headers, answer = send(server.url, data)
        assert (status, json.loads(answer)["error"]["code"]) == (403, "wrong_origin")
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "[::", "1.2.3.4"]
)
def test_a_foreign_name_that_points_here_is_refused(server, host):
    data = request(server.url, "/v1/models", method="GET", Host=host)
    status, answer = parse_json(send(server.url, data))
    assert (status, answer["error"]["code"]) == (403, "wrong_host")


def test_own_pages_and_allowed_ones_may_ask(small):
    with serving(*small, allowed_origins=("https://a.example",)) as server:
        for origin in (server.url, "https://a.example"):
            data = request(
                *(server.url, "/v1/completions", None, "OPTIONS"),
                Origin=origin,
                Access_Control_Request_Headers="authorization,x-stainless-os",
            )
            status, headers, _ = send(server.url, data)
            assert (status, headers["access-control-allow-origin"]) == (204, origin)
            assert "authorization" in headers["access-control-allow-headers"]
            body = {"prompt": "a", "max_tokens": 2}
            data = request(server.url, "/v1/completions", body, Origin=origin)
            status, headers, _ = send(server.url, data)
            assert (status, headers["access-control-allow-origin"]) == (200, origin)
        refused = request(server.url, "/", method="GET", Origin="https://b.example")
        assert send(server.url, refused)[0] == 403
        named = request(server.url, "/health", method="GET", Host="a.example")
        assert send(server.url, named)[0] == 200
        local = request(server.url, "/health", method="GET", Host="localhost:1")
        assert send(server.url, local)[0] == 200


# Many, and gone ones ----------------------------------------------------------------


def test_two_hundred_at_once_are_all_answered(server, small):
    prompts = [f"{n % 7} kings" for n in range(200)]
    expected = {
        prompt: generate(*small, prompt, replace(GREEDY, max_tokens=6), template="raw")
        for prompt in set(prompts)
    }
    start = threading.Barrier(200)

    def ask(prompt):
        start.wait()
        return post(server.url, {"prompt": prompt, "max_tokens": 6})

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, prompts))
    for prompt, (status, answer) in zip(prompts, answers, strict=True):
        assert (status, answer["choices"][0]["text"]) == (200, expected[prompt])


def test_too_many_are_told_to_come_again(server, monkeypatch):
    monkeypatch.setattr(server, "slots", threading.Semaphore(0))
    data = request(server.url, "/v1/completions", {"prompt": "a"})
    status, headers, body = send(server.url, data)
    assert (status, headers["retry-after"]) == (503, "1")
    assert json.loads(body)["error"]["code"] == "overloaded"


@pytest.fixture
def steps(monkeypatch):
    """The number of passes through a model since, one in the list."""
    counted = [0]
    call = OpenELM.__call__

    def count(self, inputs, cache=None):
        counted[0] += 1
        time.sleep(0.01)
        return call(self, inputs, cache)

    monkeypatch.setattr(OpenELM, "__call__", count)
    return counted


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("rude", [True, False])
def test_the_generation_ends_when_its_client_goes(server, steps, streams, rude):
    body = {
        "prompt": "a",
        "max_tokens": 250,
        "stream": streams,
        "logit_bias": {"2": -99},
    }
    connection = connect(server.url)
    connection.sendall(request(server.url, "/v1/completions", body))
    if streams:
        while b"data: " not in connection.recv(4096):
            pass
    else:
        time.sleep(0.3)
    if rude:  # a reset, and not a farewell
        linger = b"\x01\0\0\0\0\0\0\0"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()
    before = -1
    for _ in range(40):
        if steps[0] == before:
            break
        before = steps[0]
        time.sleep(0.7)  # longer than mlx-lm's time between two looks
    assert 0 < steps[0] < 200
    assert server.under_way == 0
    healthy(server.url)


def test_a_failure_of_ours_is_said_and_the_server_goes_on(server, monkeypatch, caplog):
    from mlx_openelm.serving import handler as module

    def fail(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(module, "read_completion", lambda *args, **options: fail())
    status, answer = post(server.url, {"prompt": "a"})
    assert (status, answer["error"]["code"]) == (503, "failed")
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert post(server.url, {"prompt": "a", "max_tokens": 2})[0] == 200
    monkeypatch.setattr(module, "Answer", fail)  # where a stream has begun
    data = request(server.url, "/v1/completions", {"prompt": "a", "stream": True})
    status, _, body = send(server.url, data)
    assert status == 200
    assert events(body)[-1]["error"]["code"] == "failed"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_model_has_failed_ends(small, caplog):
    class Failing(OpenELM):
        def __call__(self, inputs, cache=None):
            raise MemoryError("no room")

    model = Failing(small[0].config)
    mx.eval(model.parameters())
    with serving(model, small[1]) as server:
        assert post(server.url, {"prompt": "a"})[0] == 503
        for _ in range(50):
            if server.failed:
                break
            time.sleep(0.1)
        assert "The model's thread has ended" in str(server.failed)
    assert "no room" in caplog.text


def test_the_models_thread_takes_its_streams_down_itself(small, monkeypatch):
    # Else a process that ends just then aborts, in about a third of all times.
    threads, clear = [], mx.clear_streams

    def record():
        threads.append(threading.current_thread())
        clear()

    monkeypatch.setattr(mx, "clear_streams", record)
    with serving(*small) as server:
        assert post(server.url, {"prompt": "a", "max_tokens": 2})[0] == 200
        thread = server.engine._generation_thread
    assert threads == [thread]


# The command ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--host", "0.0.0.0"), "--api-key"),
        (("--host", "::"), "--api-key"),
        (("--host", "0.0.0.0", "--api-key", " "), "--api-key is empty"),
        (("--host", "no.such.host.invalid"), "no.such.host.invalid"),
        (("--host", "192.0.2.1", "--api-key", "k"), "Cannot listen"),
        (("--template", "poem"), "poem"),
        (("--log-level", "loud"), "loud"),
        (("--temp", "-1"), "--temp"),
        (("--port", "0"), "nowhere"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_one_sentence(tmp_path, args, says):
    expect_error(tmp_path, "serve", "--model", "nowhere/at/all", *args, message=says)


def test_a_second_server_on_the_port_is_one_sentence(server, tmp_path):
    port = server.server_address[1]
    args = ("serve", "--port", port, "--model", "nowhere/at/all")
    expect_error(tmp_path, *args, message=[f"port {port}", "--port"])
    healthy(server.url)


def serve(*args, **options):
    """Start the command; return the process, whose first line is the URL."""
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_openelm", "serve", "--port", "0", *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_it_at_once_and_says_so_to_clients(tmp_path, number, code):
    args, adapter = ["--quiet", "--temp", "0.7"], None
    if number == "SIGTERM":
        linears = ("layers.0.attn.qkv_proj", "layers.1.ffn.proj_2")
        factors = make_factors(weights_of(load("demo")[0].config), linears)
        adapter = write_mlx_lm_adapter(tmp_path / "adapter", factors, scale=0.5)
        args += ["--adapter-path", adapter, "--model", "demo"]
    process = serve(*args)
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        status, answer = post(url, {"prompt": "The king", "max_tokens": 9, "seed": 5})
        defaults = open_folder(demo_folder()).generation_defaults
        said = {"max_tokens": 9, "seed": 5, "temp": 0.7}
        asked = Sampling.from_defaults(defaults, said)
        expected = generate(*load("demo", adapter), "The king", asked)
        assert (status, answer["choices"][0]["text"]) == (200, expected)
        endless = {"prompt": "a", "max_tokens": 500, "logit_bias": {"2": -99}}
        with ThreadPoolExecutor(12) as pool:
            sent = [
                request(url, "/v1/completions", endless | {"stream": n % 2 == 0})
                for n in range(12)
            ]
            begun = threading.Semaphore(0)

            def ask(data):
                with connect(url) as connection:
                    connection.sendall(data)
                    begun.release()
                    return parse(read_all(connection))

            answers = [pool.submit(ask, data) for data in sent]
            for _ in sent:
                begun.acquire()
            time.sleep(0.5)
            started = time.monotonic()
            process.send_signal(getattr(signal, number))
            out, err = process.communicate(timeout=60)
        took = time.monotonic() - started
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (code, "")
    assert err == ("\nInterrupted.\n" if number == "SIGINT" else "")
    stopped = 0
    for status, headers, body in (answer.result() for answer in answers):
        if headers["content-type"] == "text/event-stream":
            last = events(body)[-1]
        else:
            last = json.loads(body)
        whole = last == "[DONE]" or (status == 200 and "choices" in last)
        assert whole or last["error"]["code"] == "shutting_down"
        stopped += not whole
    assert stopped or took < 6  # it did not wait for all to be written


# What is bent of mlx-lm -------------------------------------------------------------


def test_mlx_lm_still_has_what_is_bent():
    import mlx_lm.server as theirs
    from mlx_lm.models.cache import LRUPromptCache

    def names(function):
        return list(inspect.signature(function).parameters)

    assert names(theirs._make_sampler) == ["args", "tokenizer"]
    assert names(theirs._make_logits_processors) == ["args"]
    generator = theirs.ResponseGenerator
    assert names(generator) == ["model_provider", "prompt_cache"]
    assert names(generator._tokenize) == ["self", "tokenizer", "request", "args"]
    assert names(generator._await_response) == ["self", "response_queue"]
    assert names(generator._run_generate) == ["self"]
    assert names(generator.generate)[1:] == [
        "request",
        "generation_args",
        "progress_callback",
    ]
    assert names(theirs.ModelProvider.load)[1] == "model_path"
    assert names(LRUPromptCache.fetch_nearest_cache) == ["self", "model", "tokens"]
    source = inspect.getsource(generator._generate)
    for used in (
        "_make_sampler(args,",
        "_make_logits_processors(args)",
        "self._tokenize",
    ):
        assert used in source
    for name in (
        *("generate_response", "completion_usage_response", "handle_health_check"),
        *("_set_stream_headers", "_set_completion_headers", "_set_cors_headers"),
    ):
        assert callable(getattr(theirs.APIHandler, name)), name


def test_mlx_lms_own_prompt_cache_leaves_nothing_of_a_known_prompt():
    # Why ours is there; when this fails, it need not be any more.
    from mlx_lm.models.cache import KVCache, LRUPromptCache

    cache = LRUPromptCache(2)
    layer = KVCache()
    layer.update_and_fetch(mx.zeros((1, 1, 3, 4)), mx.zeros((1, 1, 3, 4)))
    cache.insert_cache("model", [1, 2, 3], [layer])
    assert cache.fetch_nearest_cache("model", [1, 2, 3])[1] == []
