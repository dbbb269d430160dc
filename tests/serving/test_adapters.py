"""Several adapters of one base."""

import json

import pytest
from models import build
from servers import GREEDY, USER, get, post, serving

from mlx_openelm.generation.streaming import generate


@pytest.fixture(scope="module")
def adapters(small):
    return {name: build(small[0].config, seed=n) for n, name in enumerate("ab", 7)}


@pytest.fixture(scope="module")
def server(small, adapters):
    with serving(*small, adapters=adapters, template="instruct") as started:
        yield started


def test_the_model_of_a_request_is_the_base_or_an_adapter(server, small, adapters):
    models = {"tiny": small[0], **adapters}
    for prompt in ("The king", "x" * 60, "x" * 60):  # the last from what is kept
        texts = {}
        for name, model in models.items():
            body = {"model": name, "prompt": prompt}
            status, answer = post(server.url, body)
            assert (status, answer["model"]) == (200, name)
            texts[name] = answer["choices"][0]["text"]
            expected = generate(model, small[1], prompt, GREEDY, template="raw")
            assert texts[name] == expected
        assert len(set(texts.values())) > 1
    assert post(server.url, {"prompt": "a"})[1]["model"] == "tiny"


def test_adapters_are_listed_with_their_base(server):
    listed = json.loads(get(server.url, "/v1/models")[2])["data"]
    assert [(m["id"], m["parent"]) for m in listed] == [
        ("tiny", None),
        ("a", "tiny"),
        ("b", "tiny"),
    ]
    assert json.loads(get(server.url, "/v1/models/b")[2])["parent"] == "tiny"


def test_an_unknown_model_is_refused_with_the_names(server):
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [USER]}),
    ):
        status, answer = post(server.url, body | {"model": "c"}, path)
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert "'tiny', 'a', 'b'" in answer["error"]["message"]
