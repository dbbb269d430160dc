"""Answers that follow a JSON schema, a regular expression, or a grammar."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers import USER, events, healthy, post, request, send

from mlx_openelm.generation import constraints

CHATS = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["king", "wolf"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def by_schema(schema):
    form = {"name": "answer", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": form}}


def check(text):
    value = json.loads(text)
    assert set(value) == {"name", "age", "kind"}
    assert len(value["name"]) <= 5
    assert 0 <= value["age"] <= 99
    assert value["kind"] in ("king", "wolf")


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_follow_a_schema(server, temperature):
    body = {"max_tokens": 200, "temperature": temperature, "seed": 1}
    body |= by_schema(SCHEMA)
    for stream in (False, True):
        chat = body | {"messages": [USER], "n": 3, "stream": stream}
        status, _, answer = send(server.url, request(server.url, CHATS, chat))
        assert status == 200
        if stream:
            *chunks, done = events(answer)
            assert done == "[DONE]"
            texts = ["", "", ""]
            for chunk in chunks:
                for choice in chunk["choices"]:
                    content = choice["delta"].get("content") or ""
                    texts[choice["index"]] += content
        else:
            choices = json.loads(answer)["choices"]
            assert [choice["finish_reason"] for choice in choices] == ["stop"] * 3
            texts = [choice["message"]["content"] for choice in choices]
        for text in texts:
            check(text)


def test_answers_follow_a_schema_in_a_batch_with_free_ones(server):
    free = {"prompt": "The king", "max_tokens": 30}
    expected = post(server.url, free)[1]["choices"][0]["text"]
    constrained = {"prompt": "a", "max_tokens": 200, "temperature": 1} | by_schema(
        SCHEMA
    )
    with ThreadPoolExecutor(8) as pool:
        bodies = [free, constrained] * 4
        answers = list(pool.map(lambda body: post(server.url, body), bodies))
    for n, (status, answer) in enumerate(answers):
        assert status == 200
        text = answer["choices"][0]["text"]
        if n % 2:
            check(text)
        else:
            assert text == expected


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", r"[0-9]{4}-[0-9]{2}", r"[0-9]{4}-[0-9]{2}"),
        ("regex", r"(日|本){3}", r"[日本]{3}"),
        ("grammar", 'start: "yes" | "no" " "? /[a-c]{2}/', r"yes|no ?[a-c]{2}"),
    ],
)
def test_answers_follow_a_regex_or_a_grammar(server, kind, text, pattern, beside):
    form = {kind: text} if beside else {"response_format": {"type": kind, kind: text}}
    for seed in range(3):
        body = {"prompt": "a", "max_tokens": 60, "temperature": 2, "seed": seed}
        status, answer = post(server.url, body | form)
        (choice,) = answer["choices"]
        assert (status, choice["finish_reason"]) == (200, "stop")
        assert re.fullmatch(pattern, choice["text"])


def test_any_json_object(server):
    form = {"response_format": {"type": "json_object"}}
    finished = 0
    for seed in range(6):
        body = {"messages": [USER], "max_tokens": 300, "seed": seed, "temperature": 1}
        status, answer = post(server.url, body | form, CHATS)
        assert status == 200
        (choice,) = answer["choices"]
        if choice["finish_reason"] == "stop":
            finished += 1
            assert isinstance(json.loads(choice["message"]["content"]), dict)
    assert finished


def test_stop_texts_end_a_constrained_answer(server):
    body = {"prompt": "a", "regex": "(ab){20}c", "stop": "bab", "max_tokens": 99}
    _, answer = post(server.url, body)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("a", "stop")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (by_schema({"type": "poem"}), "JSON schema cannot be used"),
        (by_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (by_schema({"$ref": "http://127.0.0.1:1/x.json"}), "JSON schema cannot be"),
        (by_schema({"anyOf": 5}), "JSON schema cannot be used"),
        (by_schema(5), "schema is 5"),
        (by_schema({"const": 1} | {"x" * 2**19: 1}), "characters"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "regex"}}, "regex"),
        ({"response_format": "json"}, "response_format is 'json'"),
        (by_schema({"x-guidance": 5}), "x-guidance is not an object"),
        ({"grammar": "start: start"}, "no text matches it"),
        ({"regex": "(" * 9}, "regular expression cannot be used"),
        ({"regex": "(?=a)b"}, "regular expression cannot be used"),
        ({"regex": "a" * (2**18 + 1)}, "regex"),
        ({"grammar": "start: nothing"}, "grammar cannot be used"),
        ({"grammar": ""}, "grammar cannot be used"),
        ({"regex": "a", "grammar": 'start: "a"'}, "one grammar"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "one grammar"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_grammar_that_cannot_be_used_is_refused_with_its_reason(
    server, form, message
):
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        (CHATS, {"messages": [USER]}),
    ):
        status, answer = post(server.url, body | {"max_tokens": 2} | form, path)
        assert (status, message in answer["error"]["message"]) == (400, True), answer
        assert len(answer["error"]["message"]) < 800
    healthy(server.url)


def test_a_grammar_that_is_too_large_is_refused(server):
    choices = [
        {"type": "object", "properties": {f"k{n}": {"type": "string"}}}
        for n in range(2100)
    ]
    body = {"prompt": "a", "max_tokens": 2} | by_schema({"anyOf": choices})
    status, answer = post(server.url, body)
    assert (status, answer["error"]["param"]) == (400, "response_format")
    assert "JSON schema cannot be used" in answer["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_grammar_that_exceeds_the_limits_later_is_no_failure_of_ours(server, stream):
    body = {"prompt": "a", "max_tokens": 400, "regex": "((a{1,100}){1,100}){1,100}"}
    body |= {"logit_bias": {"2": -100}, "stream": stream}
    status, _, answer = send(server.url, request(server.url, "/v1/completions", body))
    error = (events(answer)[-1] if stream else json.loads(answer))["error"]
    assert status == (200 if stream else 400)
    assert error["type"] == "invalid_request_error"
    assert "cannot be constrained further" in error["message"]
    assert "<state>" not in error["message"]
    healthy(server.url)


def test_a_grammar_is_not_used_up_by_earlier_requests(server, monkeypatch):
    monkeypatch.setattr(constraints, "_MOST_LEXER_STATES", 120)
    body = {"prompt": "a", "regex": "([a-z ]{1,40}e){1,30}", "max_tokens": 12}
    body |= {"temperature": 2, "n": 2}
    for seed in range(12):
        assert post(server.url, body | {"seed": seed})[0] == 200


def test_deeply_nested_schemas_do_not_end_the_server(server):
    for depth in (100, 1000, 100_000):
        body = b'{"prompt": "a", "max_tokens": 1, "response_format": {"type": '
        body += b'"json_schema", "json_schema": {"schema": '
        body += b'{"items":' * depth + b"{}" + b"}" * depth + b"}}}"
        assert post(server.url, body)[0] in (200, 400)
        healthy(server.url)
