"""Who may send requests: keys, host names, and pages of other origins."""

import json

import pytest
from commands import expect_error
from servers import client_of, complete, get, healthy, post, request, send, serving

from mlx_openelm.errors import OpenELMError
from mlx_openelm.serving.access import Access, read_origins


def test_the_models_are_listed(openai, client):
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("tiny").id == "tiny"
    assert (model.context_length, model.template) == (512, "instruct")
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.models.retrieve("other")


def test_ids_may_have_encoded_slashes(small):
    with serving(*small, adapters={"apple/OpenELM": small[0]}) as server:
        for path in ("apple/OpenELM", "apple%2FOpenELM", "apple%2fOpenELM/"):
            status, _, body = get(server.url, f"/v1/models/{path}")
            assert (status, json.loads(body)["id"]) == (200, "apple/OpenELM")


@pytest.mark.parametrize("name", ["gpt-4", "/etc", "apple/OpenELM-270M", "../demo"])
def test_nothing_is_loaded_that_a_client_names(openai, client, name):
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.completions.create(model=name, prompt="Hi")
    for field in ("adapters", "draft_model"):
        with pytest.raises(openai.BadRequestError, match=field):
            complete(client, "Hi", extra_body={field: name})


def test_the_key_is_required_except_for_the_page_and_health(openai, small, caplog):
    caplog.set_level("DEBUG")
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
            assert get(url, path)[0] == 200
        for path in ("/metrics", "/openapi.json", "/v1/models", "/nothing"):
            status, headers, _ = get(url, path)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert get(url, "/v1/models", Authorization="Bearer sésame")[0] == 200
        assert get(url, "/v1/models", Authorization="bearer  sésame ")[0] == 200
    assert "sésame" not in caplog.text


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
        ("GET", "/health"),
    ):
        body = {"prompt": "a"} if method == "POST" else None
        data = request(server.url, path, body, method, Origin=origin)
        status, headers, answer = send(server.url, data)
        assert (status, json.loads(answer)["error"]["code"]) == (403, "wrong_origin")
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "[::", "1.2.3.4", "localhost.evil.x"]
)
def test_a_foreign_name_of_this_server_is_refused(server, host):
    status, _, answer = get(server.url, "/v1/models", Host=host)
    assert (status, json.loads(answer)["error"]["code"]) == (403, "wrong_host")


def test_own_pages_and_allowed_ones_may_send_requests(small):
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
            for body in (
                {"prompt": "a", "max_tokens": 2},
                {"prompt": "a", "max_tokens": 2, "stream": True},
                {"prompt": 5},
            ):
                data = request(server.url, "/v1/completions", body, Origin=origin)
                _, headers, _ = send(server.url, data)
                assert headers["access-control-allow-origin"] == origin
                assert headers["vary"] == "Origin"
        assert get(server.url, "/", Origin="https://b.example")[0] == 403
        for host in ("a.example", "localhost:1", "127.0.0.1", "[::1]:80"):
            assert get(server.url, "/health", Host=host)[0] == 200


def test_all_origins_may_be_allowed(small):
    with serving(*small, allowed_origins=("*",)) as server:
        status, headers, _ = get(server.url, "/v1/models", Origin="https://b.example")
        allowed = headers["access-control-allow-origin"]
        assert (status, allowed) == (200, "https://b.example")
        assert get(server.url, "/v1/models", Host="any.example")[0] == 200


def test_the_key_is_not_part_of_the_text_of_a_value():
    access = Access(api_key="secret")
    assert "secret" not in f"{access} {access!r}"


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("", ()),
        (" , ", ()),
        ("*", ("*",)),
        ("https://a.example, ", ("https://a.example",)),
        (
            "https://A.example/, http://[::1]:80",
            ("https://a.example", "http://[::1]:80"),
        ),
        ("app://obsidian.md", ("app://obsidian.md",)),
    ],
)
def test_origins_are_read(text, origins):
    assert read_origins(text) == origins
    access = Access(allowed_origins=origins)
    for origin in ("", "x", "null"):
        assert access.allows_origin(origin, "") == ("*" in origins)
        assert access.allows_origin(origin, "localhost") == ("*" in origins)
    for host in (":80", "[", "]", "evil.example"):
        assert access.trusts_host(host) == ("*" in origins)
    assert access.trusts_host("localhost:80")


@pytest.mark.parametrize(
    "text",
    ["a.example", "https://", "https://:80", "http://u@a", "http://[", "null"],
)
def test_an_origin_without_scheme_or_host_is_refused(text):
    with pytest.raises(OpenELMError, match="`allowed_origins` has"):
        read_origins(f"https://a.example,{text}")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--allowed-origins", "a.example"), "--allowed-origins has 'a.example'"),
        (("--host", "0.0.0.0"), "--api-key"),
        (("--host", "::"), "--api-key"),
        (("--host", "0.0.0.0", "--api-key", " "), "--api-key is empty"),
        (("--host", "no.such.host.invalid"), "no.such.host.invalid"),
        (("--host", "192.0.2.1", "--api-key", "k"), "Cannot listen"),
        (("--template", "poem"), "poem"),
        (("--log-level", "loud"), "loud"),
        (("--temp", "-1"), "--temp"),
        (("--port", "0"), "nowhere"),
        (("--adapter", "tales"), "NAME=DIR"),
        (("--adapter", "a=x", "--adapter", "a=y"), "twice"),
        (("--adapter", "a=x", "--adapter-path", "y"), "--adapter NAME=DIR"),
        (("--model", "demo", "--quiet", "--adapter", "a=nowhere"), "check --adapter."),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_one_sentence(tmp_path, monkeypatch, args, message):
    monkeypatch.setattr("logging.basicConfig", lambda **options: None)
    expect_error(tmp_path, "serve", "--model", "nowhere/at/all", *args, message=message)


def test_a_second_server_on_the_port_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **options: None)
    port = server.url.rpartition(":")[2]
    args = ("serve", "--port", port, "--model", "nowhere/at/all")
    expect_error(tmp_path, *args, message=[f"port {port}", "--port"])
    healthy(server.url)
