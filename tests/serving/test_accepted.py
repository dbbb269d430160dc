"""Every option and request field that earlier versions of `serve` accepted."""

import pytest
from commands import call
from servers import USER, post

OPTIONS = {
    "--model": "nowhere/at/all",
    "--adapter-path": "nowhere/too",
    "--host": "localhost",
    "--port": "0",
    "--api-key": "secret key",
    "--allowed-origins": "https://a.example, https://b.example/",
    "--template": "alpaca",
    "--max-tokens": "5",
    "-m": "5",
    "--temp": "0.5",
    "--top-p": "0.9",
    "--top-k": "9",
    "--min-p": "0.1",
    "--repetition-penalty": "1.2",
    "--seed": "3",
    "--decode-concurrency": "2",
    "--prompt-concurrency": "2",
    "--prompt-cache-size": "1",
    "--log-level": "debug",
    "--quiet": None,
    "--offline": None,
}

EXTENDED = {  # by later versions
    "--adapter": "tales=nowhere",
    "--max-queue": "5",
    "--prompt-cache-bytes": "1000000",
    "--request-timeout": "0.5",
}


@pytest.mark.parametrize("option", [*OPTIONS, *EXTENDED])
def test_every_option_is_accepted(option, monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **options: None)
    value = (OPTIONS | EXTENDED)[option]
    given = [option] if value is None else [option, value]
    model = [] if option == "--model" else ["--model", "nowhere/at/all"]
    port = [] if option == "--port" else ["--port", "0"]
    ran = call("serve", *given, *model, *port)
    # It fails at the model, which is opened after the options are checked.
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert "nowhere/" in ran.stderr


def test_the_key_may_be_in_the_environment(monkeypatch):
    monkeypatch.setenv("MLX_OPENELM_API_KEY", " ")
    ran = call("serve", "--model", "nowhere/at/all", "--port", "0")
    assert "--api-key is empty, begins" in ran.stderr


SHARED = {
    "model": [None, "", "default_model", "tiny"],
    "max_tokens": [None, 1, -1],
    "max_completion_tokens": [None, 1, -1],
    "min_tokens": [None, 0, 3],
    "temperature": [None, 0, 0.0, 1, 0.7, 1000000],
    "top_p": [None, 0, 0.5, 1],
    "top_k": [None, 0, 7, 10**9, -1],
    "min_p": [None, 0, 0.5, 1],
    "repetition_penalty": [None, 0, 1, 1.3],
    "repetition_context_size": [None, 1, 20, 10**9, 2**63, 2**70, -1],
    "no_repeat_ngram_size": [None, 0, 2],
    "presence_penalty": [None, -2, 0, 0.5, 2],
    "frequency_penalty": [None, -2, 0, 0.5, 2],
    "logit_bias": [None, {}, {"5": 1}, {"5": -100, "007": 100.0}],
    "seed": [None, 0, 2**32, 2**64 - 1, -1],
    "stop": [None, "", "x", [], ["x", "yz"], ["x"] * 16],
    "stream": [None, False, True],
    "stream_options": [None, {}, {"include_usage": True}, {"other": 1}],
    "n": [None, 1],
    "tools": [None, []],
    "functions": [None, []],
    "response_format": [None, {"type": "text"}],
    "modalities": [None, ["text"]],
    "adapters": [None],
    "draft_model": [None, "default_model"],
    "role_mapping": [None],
    "chat_template_kwargs": [None, {}],
    "xtc_probability": [None, 0, 0.0],
    "user": ["me"],
    "parallel_tool_calls": [True],
    "num_draft_tokens": [3],
    "something_else": [{"deep": [1, 2, {"x": None}]}],
}
COMPLETION = {
    "prompt": ["", "a", "日本語", ["a"], [5, 6], [[5, 6]]],
    "logprobs": [None, True, False, 0, 1, 20],
    "top_logprobs": [None, 0, 5],
    "best_of": [None, 1],
    "echo": [None, False],
    "suffix": [None, ""],
}
PART = {"type": "text", "text": "Hi"}
CHAT = {
    "messages": [
        [USER],
        [{"role": "system", "content": "Be brief."}, USER],
        [{"role": "developer", "content": "Be brief."}, USER],
        [{"role": "user", "content": [PART, PART], "name": "me"}],
        [USER, {"role": "assistant", "content": "Yes?"}, USER],
        [{"role": "assistant", "content": "Yes?"}, USER],
        [USER, USER],
        [USER, {"role": "system", "content": "Be brief."}],
    ],
    "logprobs": [None, True, False],
    "top_logprobs": [None, 0],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in SHARED.items() for value in values],
    ids=lambda value: str(value)[:40],
)
def test_every_shared_field_is_accepted(server, field, value):
    completion = {"prompt": "a", "max_tokens": 2} | {field: value}
    chat = {"messages": [USER], "max_tokens": 2} | {field: value}
    if completion.get("stream"):
        pytest.skip("see test_completions and test_chats")
    if value == -1 or (value and field == "max_completion_tokens"):
        completion["logit_bias"] = chat["logit_bias"] = {"2": 100}  # EOS at once
    assert post(server.url, completion)[0] == 200
    assert post(server.url, chat, "/v1/chat/completions")[0] == 200


@pytest.mark.parametrize("field", COMPLETION)
def test_every_field_of_completions_is_accepted(server, field):
    for value in COMPLETION[field]:
        body = {"prompt": "a", "max_tokens": 2} | {field: value}
        assert post(server.url, body)[0] == 200, value


@pytest.mark.parametrize("field", CHAT)
def test_every_field_of_chats_is_accepted(server, field):
    for value in CHAT[field]:
        body = {"messages": [USER], "max_tokens": 2} | {field: value}
        status, answer = post(server.url, body, "/v1/chat/completions")
        assert status == 200, (value, answer)
