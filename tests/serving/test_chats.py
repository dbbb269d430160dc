"""Chats: the answers are those of `chat`, for the clients that exist."""

import itertools
import json

import pytest
from servers import (
    GREEDY,
    USER,
    client_of,
    connect,
    events,
    get,
    parse,
    post,
    read_all,
    request,
    send,
    serving,
    space_of,
)

from mlx_openelm.generation.constraints import GrammarCompiler
from mlx_openelm.generation.conversation import Conversation
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import generate
from mlx_openelm.serving.api import ChatRequest, CompletionRequest, read_request
from mlx_openelm.serving.completions import check_completion
from mlx_openelm.serving.served import Served, ServedModel

PATH = "/v1/chat/completions"
ASSISTANT = {"role": "assistant", "content": "Hello. How can I help?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def ask(client, messages, **options):
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def test_chats_are_those_of_chat(client, small):
    texts = ("Who are you?", "And?\n", "日本 </s> x")
    with_system = Conversation(*small, GREEDY, template="instruct", system="Be kind.")
    plain = Conversation(*small, GREEDY, template="instruct")
    for conversation in (plain, with_system):
        messages = [{"role": "system", "content": conversation.system}]
        messages = messages if conversation.system else []
        for text in texts[: 2 if conversation.system else 3]:
            content = [{"type": "text", "text": text}]
            messages.append({"role": "user", "content": content})
            answer = ask(client, messages)
            expected = "".join(piece.text for piece in conversation.reply(text))
            assert (answer.choices[0].message.content or "") == expected
            streamed = ask(client, messages, stream=True)
            deltas = [c.choices[0].delta.content or "" for c in streamed]
            assert "".join(deltas) == expected
            messages.append({"role": "assistant", "content": expected})
        assert not conversation.omitted_pairs


def test_a_model_without_a_template_continues_one_text(openai, small):
    with serving(*small) as server:
        messages = [{"role": "user", "content": "The king"}]
        answer = ask(client_of(openai, server), messages)
        expected = generate(*small, "The king", GREEDY, template="raw")
        assert answer.choices[0].message.content == expected
        body = {"messages": [SYSTEM, USER]}
        status, refused = post(server.url, body, PATH)
        assert (status, "system message" in refused["error"]["message"]) == (400, True)
        assert post(server.url, body | {"template": "instruct"}, PATH)[0] == 200
        status, refused = post(server.url, body | {"template": "poem"}, PATH)
        assert (status, refused["error"]["param"]) == (400, "template")


def test_a_space_that_the_template_ends_in_is_not_part_of_the_answer(openai, small):
    space = space_of(small[1])
    sampling = Sampling(max_tokens=3, logit_bias=((space, 100.0),))
    conversation = Conversation(*small, sampling, template="openelm-peft")
    expected = "".join(piece.text for piece in conversation.reply("Hi"))
    assert not expected.startswith(" ")
    with serving(*small, template="openelm-peft") as server:
        options = {"max_tokens": 3, "logit_bias": {str(space): 100}}
        answer = ask(client_of(openai, server), [USER], **options)
    assert answer.choices[0].message.content == expected


def test_an_answer_that_spells_eos_ends_there(small):
    served = Served({"t": ServedModel("t", small[0], "instruct")}, small[1], {}, {})

    compiler = GrammarCompiler(served.tokenizer, served.vocab_size)

    def stops(kind, body):
        request = read_request(kind, json.dumps(body).encode())
        completion = check_completion(request, served, compiler)
        return completion.choices[0].request.sampling.stop

    chat = {"messages": [USER], "stop": "x"}
    assert stops(ChatRequest, chat) == ("x", "</s>")
    assert stops(ChatRequest, chat | {"template": "raw"}) == ("x",)
    assert stops(CompletionRequest, {"prompt": "a"}) == ()


# Clients as they are -------------------------------------------------------------


def test_only_the_first_chunk_of_a_stream_names_the_role(server):
    for count in (1, 3):
        body = {"messages": [USER], "stream": True, "n": count, "temperature": 1}
        status, _, answer = send(server.url, request(server.url, PATH, body))
        assert status == 200
        *chunks, done = events(answer)
        assert done == "[DONE]"
        deltas = [(c["index"], c["delta"]) for e in chunks for c in e["choices"]]
        roles = [(index, d["role"]) for index, d in deltas if "role" in d]
        assert roles == [(index, "assistant") for index in range(count)]
        firsts = dict(reversed(deltas))
        assert all("role" in delta for delta in firsts.values())


def test_the_clients_stream_helper_continues_a_conversation(openai, server):
    client = client_of(openai, server)
    options = {"logit_bias": {"2": 100}, "extra_body": {"min_tokens": 3}}
    options |= {"model": "tiny", "messages": [USER]}
    with client.chat.completions.stream(**options) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.role == "assistant"
    messages = [USER, {"role": message.role, "content": message.content}, USER]
    assert ask(client, messages, max_tokens=2).choices[0].finish_reason


@pytest.mark.parametrize(
    "roles",
    [
        roles
        for count in (1, 2, 3)
        for roles in itertools.product("sua", repeat=count)
        if roles[-1] == "u"
    ],
    ids="".join,
)
def test_messages_may_have_any_order(server, roles):
    known = {"s": SYSTEM, "u": USER, "a": ASSISTANT}
    body = {"messages": [known[role] for role in roles], "max_tokens": 2}
    status, answer = post(server.url, body, PATH)
    assert status == 200, answer


@pytest.mark.parametrize("prefix", ["", "/v1"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_paths_with_and_without_v1_and_a_slash(server, prefix, slash):
    chat = {"messages": [USER], "max_tokens": 1}
    for path, body in (
        ("/chat/completions", chat),
        ("/completions", {"prompt": "a", "max_tokens": 1}),
    ):
        assert post(server.url, body, f"{prefix}{path}{slash}")[0] == 200
    status, _, answer = get(server.url, f"{prefix}/models{slash}")
    assert (status, json.loads(answer)["data"][0]["id"]) == (200, "tiny")


def test_a_request_to_a_proxy_names_the_whole_url(server):
    data = request(server.url, f"{server.url}/v1/models", method="GET")
    assert send(server.url, data)[0] == 200


@pytest.mark.parametrize("sizes", [(1,), (7, 1000), (100000,)])
def test_a_body_may_come_in_chunks(server, sizes):
    text = json.dumps({"messages": [USER], "max_tokens": 2}).encode()
    size, rest = itertools.cycle(sizes), text
    parts = []
    while rest:
        part, rest = rest[: (count := next(size))], rest[count:]
        parts.append(f"{len(part):x}\r\n".encode() + part + b"\r\n")
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked"
    with connect(server.url) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode())
        for part in [*parts, b"0\r\n\r\n"]:
            connection.sendall(part)
        status, _, body = parse(read_all(connection))
    assert (status, "choices" in json.loads(body)) == (200, True)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_closes_its_sending_side_is_answered(server, stream, version):
    body = {"messages": [USER], "max_tokens": 20, "stream": stream}
    data = request(server.url, PATH, body).replace(
        b"HTTP/1.1", b"HTTP/" + version.encode(), 1
    )
    with connect(server.url) as connection:
        connection.sendall(data)
        connection.shutdown(1)
        answer = read_all(connection)
    assert stream or answer.startswith(b"HTTP/1.0 200 ")
    status, headers, content = parse(answer)
    assert status == 200
    assert "transfer-encoding" not in headers or (stream and version == "1.1")
    if stream:
        assert events(content)[-1] == "[DONE]"
    else:
        assert json.loads(content)["choices"][0]["message"]["role"] == "assistant"


def test_a_client_may_ask_before_it_sends_its_body(server):
    body = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    data = request(server.url, "/v1/completions", body, Expect="100-continue")
    head, rest = data.removesuffix(body), body
    with connect(server.url) as connection:
        connection.sendall(head)
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
        connection.sendall(rest)
        assert parse(read_all(connection))[0] == 200
