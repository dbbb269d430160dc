"""Wrong requests: each is answered with its reason, and the server continues."""

import json
import time

import pytest
from servers import (
    CONTEXT,
    USER,
    complete,
    connect,
    get,
    healthy,
    parse,
    post,
    read_all,
    request,
    send,
    serving,
)

from mlx_openelm.serving import guard
from mlx_openelm.serving.api import MOST_BYTES

CHATS = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "prompt must be"),
        ({"prompt": {}}, "prompt must be"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": ["a", 5]}, "prompt must be"),
        ({"prompt": ["a", ["b"]]}, "prompt must be"),
        ({"prompt": [[[5]]]}, "prompt must be"),
        ({"prompt": [1, 2.5]}, "prompt must be"),
        ({"prompt": [1, True]}, "prompt must be"),
        ({"prompt": [1, 300]}, "not in 0 to 299"),
        ({"prompt": [-1]}, "not in 0 to 299"),
        ({"prompt": [10**30]}, "not in 0 to 299"),
        ({"prompt": "\ud800"}, "JSON"),
        ({"prompt": "x " * 1_000_000}, "and the model's context is 512"),
        ({"prompt": [5] * 1_000_000}, "has 1000000 tokens"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 5, "max_completion_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -2}, "max_tokens is -2"),
        ({"no_repeat_ngram_size": 65}, "no_repeat_ngram_size is 65"),
        ({"max_tokens": "9"}, "max_tokens is '9'"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "hot" * 10**5}, "temperature is "),
        ({"temperature": 1e999}, "JSON"),
        ({"temperature": [[]]}, "temperature is"),
        ({"top_p": 2}, "top_p is 2"),
        ({"top_k": -2}, "top_k is -2"),
        ({"min_p": 2}, "min_p is 2"),
        ({"seed": -2}, "seed is -2"),
        ({"seed": 2**70}, "seed is"),
        ({"seed": 10**4000}, "seed is"),
        ({"repetition_penalty": -1}, "repetition_penalty is -1"),
        ({"repetition_context_size": 0}, "repetition_context_size is 0"),
        ({"presence_penalty": 9}, "presence_penalty is 9"),
        ({"frequency_penalty": "x"}, "frequency_penalty is 'x'"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"logprobs": "x"}, "logprobs is 'x'"),
        ({"logit_bias": {"300": 1}}, "0 to 299"),
        ({"logit_bias": {"a": 1}}, "token ids"),
        ({"logit_bias": {"\u0665": 1}}, "token ids"),
        ({"logit_bias": [1]}, "logit_bias is"),
        ({"logit_bias": {"1": None}}, "logit_bias is None"),
        ({"logit_bias": {"1": 1e7}}, "logit_bias"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "at most 1024"),
        ({"logit_bias": {str(n): "x" for n in range(2000)}}, "2000 entries"),
        ({"stop": [""]}, "stop.0 is ''; it must be"),
        ({"stop": [1]}, "stop.0 is 1"),
        ({"stop": ["a"] * 17}, "16"),
        ({"stop": 5}, "stop is 5"),
        ({"stream": "yes"}, "stream is 'yes'"),
        ({"stream": True, "stream_options": 3}, "stream_options is 3"),
        ({"n": 0}, "n is 0"),
        ({"n": 2.5}, "n is 2.5"),
        ({"best_of": 4}, "best_of is 4"),
        ({"echo": "yes"}, "echo is 'yes'"),
        ({"suffix": "x"}, "suffix"),
        ({"tools": [{}]}, "tools"),
        ({"adapters": "/etc"}, "adapters is '/etc'"),
        ({"draft_model": "gpt-4"}, "draft_model is 'gpt-4'"),
        ({"xtc_probability": 0.5}, "xtc_probability is 0.5"),
        ({"model": ["x"]}, "model is"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_field_is_named(server, change, message):
    body = json.dumps({"prompt": "a", "max_tokens": 2} | change).encode()
    status, answer = post(server.url, body)
    assert status == 400
    error = answer["error"]
    assert message in error["message"]
    assert error["message"].endswith(".")
    assert len(error["message"]) < 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] in (*change, None)


PICTURE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": None}, "messages is None"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hi"]}, "messages.0 is 'Hi'"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no content"),
        ({"messages": [{"role": "user", "content": None}]}, "no content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": ["x"], "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, "not text"),
        ({"messages": [{"role": "user", "content": [5]}]}, "not text"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "not a string"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "JSON"),
        ({"messages": [{"role": "user", "content": "long " * 800}]}, "shorten"),
        ({"messages": [USER] * 5000}, "4096"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "poem"}}, "response_format.type is 'poem'"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"logprobs": 5}, "logprobs is 5"),
        ({"top_logprobs": 5}, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs is 50"),
        ({"template": "poem"}, "template must be one of"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_chat_is_named(server, change, message):
    body = json.dumps({"messages": [USER], "max_tokens": 2} | change).encode()
    status, answer = post(server.url, body, CHATS)
    assert (status, message in answer["error"]["message"]) == (400, True), answer


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b" ",
            b"{",
            b"[]",
            b"5",
            b'"x"',
            b"null",
            b"\xff\xfe\xfd",
            b"\xef\xbb\xbf",
        ),
        *(b'{"prompt": NaN}', b'{"prompt": Infinity}', b'{"prompt": "a",}'),
        *(b'{"prompt": "a"} x', b"{'prompt': 'a'}", b'{"prompt": "a\x00"}'),
        *(b"[" * 10**6, b'{"a":' * 10**6, b'{"prompt": ' + b"9" * 10**5 + b"}"),
        '{"prompt": "a"}'.encode("utf-16"),
        b'{"prompt": "\xff"}',
    ],
    ids=lambda body: repr(body[:16]),
)
def test_what_is_not_json_is_refused(server, body):
    for path in ("/v1/completions", CHATS):
        status, answer = post(server.url, body, path)
        assert status == 400
        assert "JSON" in answer["error"]["message"]
    healthy(server.url)


CHUNKS = b"5\r\nhello\r\nzz\r\nnonsense"


@pytest.mark.parametrize(
    ("lines", "rest", "status"),
    [
        ("POST /v1/completions HTTP/1.1\r\nContent-Length: 9999999999", b"{}", 413),
        (f"POST /v1/completions HTTP/1.1\r\nContent-Length: {'9' * 50}", b"", 400),
        ("POST /v1/completions HTTP/1.1\r\nContent-Length: -5", b"{}", 400),
        ("POST /v1/completions HTTP/1.1\r\nContent-Length: ²", b"{}", 400),
        ("POST /v1/completions HTTP/1.1\r\nContent-Length: ", b"{}", 400),
        ("POST /v1/completions HTTP/1.1\r\nContent-Length: 9", b"{}", 400),
        ("POST /v1/completions HTTP/1.1", b"", 400),
        ("POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked", CHUNKS, 400),
        ("POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked", b"5\r\n{", 400),
        ("POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: gzip", b"{}", 501),
        ("POST / HTTP/1.1\r\nContent-Length: 2", b"{}", 405),
        ("POST /v1/../etc HTTP/1.1\r\nContent-Length: 2", b"{}", 404),
        ("GET /serving.html HTTP/1.1", b"", 404),
        ("GET /v1/completions HTTP/1.1", b"", 405),
        ("GET /%00%ff/x HTTP/1.1", b"", 404),
        ("GET //[ HTTP/1.1", b"", 404),
        ("GET http://[bad/nothing HTTP/1.1", b"", 404),
        ("DELETE /v1/models HTTP/1.1", b"", 405),
        ("BREW /health HTTP/1.1", b"", 405),
        ("GET / HTTP/9.9", b"", 505),
        ("GET /", b"", 400),
        ("\x00\x01\x02", b"", 400),
        (f"GET /{'a' * 500000} HTTP/1.1", b"", 400),
        ("GET / HTTP/1.1" + "\r\nA: b" * 70000, b"", 400),
        ("GET / HTTP/1.1\r\nHost: x", b"", 400),  # two of them
        ("GET / HTTP/1.1\r\nA b", b"", 400),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("half_close", [True, False])
def test_malformed_requests_are_answered_in_json(
    server, lines, rest, status, half_close, monkeypatch
):
    if not half_close and (rest in (b"5\r\n{",) or lines.endswith((": 9", "99999"))):
        return  # more may follow
    host = "" if lines.startswith("\x00") else f"\r\nHost: {server.url[7:]}"
    data = f"{lines}{host}\r\n\r\n".encode() + rest
    found, headers, body = send(server.url, data, half_close=half_close)
    assert found in (status, 400 if status == 501 else status)
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert json.loads(body)["error"]["message"].endswith(".")
    healthy(server.url)


def test_a_body_without_its_last_chunk_is_refused(server):
    body = b'{"prompt": "a", "max_tokens": 1}'  # nothing is missing in it
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {server.url[7:]}\r\n"
    head += f"Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n"
    data = head.encode() + body + b"\r\n"
    status, _, answer = send(server.url, data, half_close=True)
    assert (status, "within the body" in answer.decode()) == (400, True)
    assert send(server.url, data + b"0\r\n\r\n", half_close=True)[0] == 200


def test_a_request_without_a_host_is_refused(server):
    with connect(server.url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert parse(read_all(connection))[0] == 400
    with connect(server.url) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert parse(read_all(connection))[0] == 200


def test_a_method_that_is_not_possible_names_those_that_are(server):
    status, headers, body = get(server.url, "/v1/completions")
    assert (status, headers["allow"]) == (405, "POST")
    assert json.loads(body)["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("path", "status", "headers"),
    [
        ("/v1/completions", 413, {}),
        ("/v1/nothing", 404, {}),
        ("/v1/models", 405, {}),
        ("/v1/completions", 403, {"Host": "evil.example"}),
    ],
)
def test_the_rest_of_a_refused_body_is_read(server, path, status, headers):
    # Else the response is lost where the client still sends.
    body = b"x" * (MOST_BYTES + 1)
    found, answer = post(server.url, body, path, **headers)
    assert (found, "error" in answer) == (status, True)


def test_the_rest_of_a_malformed_request_is_read(server):
    data = b"GET / HTTP/1.1\r\n" + b"a: " + b"b" * 2**22 + b"\r\n\r\n"
    assert send(server.url, data)[0] == 400


def test_a_body_of_the_largest_size_is_read(server):
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    assert post(server.url, body + b" " * (MOST_BYTES - len(body)))[0] == 200
    status, answer = post(server.url, body + b" " * (MOST_BYTES - len(body) + 1))
    assert (status, answer["error"]["code"]) == (413, "too_large")


def test_bodies_together_are_bounded(small, monkeypatch):
    monkeypatch.setattr(guard, "MOST_BYTES_TOGETHER", 2**20)
    with serving(*small) as server:
        data = request(server.url, "/v1/completions", b"{" * 900_000)
        with connect(server.url) as first:
            first.sendall(data[:-1])  # waits for its last byte
            time.sleep(0.3)
            status, headers, body = send(server.url, data)
            assert (status, headers["retry-after"]) == (503, "1")
            assert json.loads(body)["error"]["code"] == "overloaded"
            first.sendall(data[-1:])
            assert parse(read_all(first))[0] == 400
        assert send(server.url, data)[0] == 400  # the limit has space again


def test_an_incomplete_body_is_refused_after_a_while(server, monkeypatch):
    data = request(server.url, "/v1/completions", b'{"pro', Content_Length="500")
    monkeypatch.setattr(guard, "CLIENT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(guard, "_DISCARD_S", 0.2)
    status, _, answer = send(server.url, data)
    assert (status, "complete" in json.loads(answer)["error"]["message"]) == (408, True)
    healthy(server.url)


@pytest.mark.parametrize("data", [b"", b"GET", b"GET /health HTTP/1.1\r\nHost: local"])
def test_incomplete_headers_end_the_connection_after_a_while(small, monkeypatch, data):
    monkeypatch.setattr("mlx_openelm.serving.connections.HEADER_TIMEOUT_S", 0.3)
    with serving(*small) as server, connect(server.url) as connection:
        connection.sendall(data)
        assert read_all(connection) == b""


def test_a_prompt_without_room_is_refused(openai, client):
    with pytest.raises(openai.BadRequestError, match="512 tokens, and the") as error:
        complete(client, [5] * CONTEXT)
    assert error.value.code == "context_length_exceeded"


def test_too_many_connections_are_refused(small, monkeypatch):
    monkeypatch.setattr("mlx_openelm.serving.connections._most_connections", lambda: 3)
    with serving(*small) as server:
        open_ones = [connect(server.url) for _ in range(3)]
        time.sleep(0.2)
        status, headers, _ = get(server.url, "/health")
        assert (status, headers["retry-after"]) == (503, "1")
        for one in open_ones:
            one.close()
        time.sleep(0.2)
        healthy(server.url)


def test_a_failure_of_ours_is_reported_and_the_server_continues(
    server, monkeypatch, caplog
):
    def fail(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("mlx_openelm.serving.app.check_completion", fail)
    status, headers, body = send(
        server.url, request(server.url, "/v1/completions", {"prompt": "a"})
    )
    assert (status, headers["connection"]) == (500, "close")
    assert json.loads(body)["error"]["code"] == "failed"
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert post(server.url, {"prompt": "a", "max_tokens": 2})[0] == 200
