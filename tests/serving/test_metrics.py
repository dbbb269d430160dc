"""Measurements at /metrics, the description at /openapi.json, and the log."""

import json

import pytest
from servers import (
    USER,
    complete,
    get,
    measure,
    post,
    request,
    send,
    serving,
    wait_until_idle,
)

from mlx_openelm.serving.api import ChatRequest, CompletionRequest

COUNTED = 'requests_total{path="/v1/completions",status="%s"}'


def test_requests_and_tokens_are_counted(small):
    with serving(*small) as server:
        bias = {"2": -100}
        for n in (3, 5):
            body = {"prompt": [5] * 40, "max_tokens": n, "logit_bias": bias}
            assert post(server.url, body)[0] == 200
        assert post(server.url, {"prompt": []})[0] == 400
        found = measure(server.url)
        assert found[COUNTED % 200] == 2
        assert found[COUNTED % 400] == 1
        assert found["prompt_tokens_total"] == 80
        assert found["cached_prompt_tokens_total"] == 39
        assert found["generated_tokens_total"] == 8
        assert found["time_to_first_token_seconds_count"] == 2
        assert found["answer_tokens_per_second_count"] == 2
        assert found["kept_prompt_bytes"] > 0
        assert found["memory_peak_bytes"] >= found["memory_active_bytes"] > 0
        wait_until_idle(server.url)


def test_paths_of_clients_are_not_kept(server):
    for n in range(5):
        get(server.url, f"/v1/models/{n}")
        get(server.url, f"/models/tiny/{n}")
        get(server.url, f"/{n}")
        send(server.url, request(server.url, f"/{n}", method=f"BREW{n}"))
    found = measure(server.url)
    labels = {name for name in found if name.startswith("requests_total")}
    assert 'requests_total{path="/v1/models/{name}",status="404"}' in labels
    assert 'requests_total{path="other",status="404"}' in labels
    assert len(labels) < 20


def test_the_description_names_every_field(server):
    status, _, body = get(server.url, "/openapi.json")
    described = json.loads(body)
    assert (status, described["openapi"]) == (200, "3.1.0")
    schemas = described["components"]["schemas"]
    for kind in (CompletionRequest, ChatRequest):
        fields = {f.alias or name for name, f in kind.model_fields.items()}
        assert fields == set(schemas[kind.__name__]["properties"])
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health"):
        assert path in described["paths"]


def test_the_log_has_a_line_for_each_request(server, caplog):
    caplog.set_level("INFO", "mlx_openelm.serving")
    get(server.url, "/v1/models")
    get(server.url, "/a%1b%5b31m%0d%0ab")
    post(server.url, {"prompt": 5})
    lines = [r.getMessage() for r in caplog.records if r.name == "mlx_openelm.serving"]
    assert lines == [
        "GET /v1/models 200",
        r"GET /a\x1b[31m\r\nb 404",
        "POST /v1/completions 400",
    ]


@pytest.mark.parametrize("chat", [True, False])
def test_whole_responses_state_their_length(server, chat):
    body = {"messages": [USER]} if chat else {"prompt": "a"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    _, headers, content = send(server.url, request(server.url, path, body))
    assert int(headers["content-length"]) == len(content)
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"


def test_cached_tokens_are_reported(client):
    ids = [7] * 50
    complete(client, ids, max_tokens=2)
    usage = complete(client, [*ids, 9], max_tokens=2).usage
    assert usage.prompt_tokens_details.cached_tokens >= 50
