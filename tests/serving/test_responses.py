"""How responses are sent, and what they occupy meanwhile."""

import asyncio
import socket
from contextlib import nullcontext

import pytest
from servers import measure, post, request, serving, shrink_buffers, wait_until

from mlx_openelm.serving import responses
from mlx_openelm.serving.answers import ResponseWriter
from mlx_openelm.serving.responses import StreamedResponse, WholeResponse

PATH = "/v1/completions"
SCOPE = {"type": "http"}


async def connected():
    """The receive function of a client that stays connected."""
    await asyncio.Event().wait()


@pytest.mark.parametrize("stream", [True, False])
def test_the_slots_of_complete_answers_are_free_while_they_are_sent(small, stream):
    body = {"prompt": [9] * 200, "echo": True, "logprobs": 20, "n": 4, "max_tokens": 2}
    body |= {"logit_bias": {"2": -99}, "temperature": 1, "stream": stream}
    with serving(*small, queue=0, engine={"answers": 4}) as server:
        shrink_buffers(server)
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        host, _, port = server.url.removeprefix("http://").partition(":")
        stalled.connect((host, int(port)))
        with stalled:
            stalled.sendall(request(server.url, PATH, body))
            wait_until(lambda: measure(server.url)["generated_tokens_total"] >= 8)
            short = {"prompt": "a", "n": 4, "max_tokens": 1}
            assert post(server.url, short)[0] == 200
            done = f'requests_total{{path="{PATH}",status="200"}}'
            assert measure(server.url)[done] == 1  # the other is still being sent


@pytest.mark.parametrize("length", [0, 1, 2**16, 2**16 + 1, 300_000])
def test_a_document_is_sent_in_parts(length):
    sent = []

    async def send(message):
        sent.append(message)

    async def document():
        return "x" * length

    response = WholeResponse(document(), nullcontext())
    asyncio.run(response(SCOPE, connected, send))
    start, *parts = sent
    assert dict(start["headers"])[b"content-length"] == str(length).encode()
    assert b"".join(part["body"] for part in parts) == b"x" * length
    assert all(len(part["body"]) <= 2**16 for part in parts)
    assert [part.get("more_body", False) for part in parts][-2:] in (
        [False],
        [True, False],
    )


@pytest.mark.parametrize("where", [b"data", b"keep-alive"])
def test_the_events_are_closed_when_the_client_cannot_be_reached(monkeypatch, where):
    monkeypatch.setattr(responses, "_KEEP_ALIVE_S", 0.001)
    closed = []

    async def events():
        try:
            yield "{}"
            yield "{}"  # is taken while the first is sent
            await asyncio.Event().wait()
        finally:
            closed.append("events")

    async def send(message):
        if where in message.get("body", b""):
            await asyncio.sleep(0.01)
            raise ConnectionError

    async def respond():
        with pytest.raises(ConnectionError):
            await StreamedResponse(events(), nullcontext())(SCOPE, connected, send)
        closed.append("response")

    asyncio.run(respond())
    assert closed == ["events", "response"]


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_log_probabilities_are_written_outside_of_the_event_loop(
    server, monkeypatch, logprobs
):
    in_loop, whole = [], ResponseWriter.whole

    def record(self, chunks):
        try:
            asyncio.get_running_loop()
            in_loop.append(True)
        except RuntimeError:
            in_loop.append(False)
        return whole(self, chunks)

    monkeypatch.setattr(ResponseWriter, "whole", record)
    body = {"prompt": "a", "max_tokens": 2, "logprobs": logprobs}
    assert post(server.url, body)[0] == 200
    assert in_loop == [logprobs is None]
