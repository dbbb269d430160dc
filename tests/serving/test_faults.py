"""Clients that vanish, stall, or come all at once."""

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from places import ROOT
from servers import (
    GREEDY,
    connect,
    get,
    healthy,
    measure,
    parse,
    post,
    read_all,
    request,
    reset,
    send,
    serving,
    shrink_buffers,
    wait_until,
    wait_until_idle,
)

from mlx_openelm.generation.streaming import generate
from mlx_openelm.serving import app, connections, guard

ENDLESS = {"prompt": "a", "max_tokens": 400, "logit_bias": {"2": -99}}
PATH = "/v1/completions"


@pytest.fixture
def slow_steps(small, monkeypatch):
    """The number of steps, in a list, each of which takes 20 ms or more."""
    steps, call = [0], type(small[0].transformer).__call__

    def slow(*args, **options):
        steps[0] += 1
        time.sleep(0.02)
        return call(*args, **options)

    monkeypatch.setattr(type(small[0].transformer), "__call__", slow)
    return steps


def ask_together(url, bodies):
    """Send all requests at the same moment; return status, headers and bodies."""
    start = threading.Barrier(len(bodies))

    def ask(body):
        data = request(url, PATH, body)
        start.wait()
        return send(url, data)

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(ask, bodies))


@contextlib.contextmanager
def counting(url):
    """Yield a list that receives how many requests the engine has, again and again."""
    counts, done = [], threading.Event()

    def count():
        while not done.is_set():
            found = measure(url)
            counts.append(found["waiting_requests"] + found["decoding_requests"])
            time.sleep(0.01)

    thread = threading.Thread(target=count)
    thread.start()
    yield counts
    done.set()
    thread.join()


# Clients that vanish -------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["reset", "close", "half-closed, then reset"])
def test_the_row_of_a_client_that_vanishes_is_freed(
    server, slow_steps, monkeypatch, stream, how
):
    monkeypatch.setattr("mlx_openelm.serving.responses._PROBE_S", 0.05)
    connection = connect(server.url)
    connection.sendall(request(server.url, PATH, ENDLESS | {"stream": stream}))
    if "half-closed" in how:
        connection.shutdown(socket.SHUT_WR)
    if stream:
        while b"data: " not in connection.recv(4096):
            pass
    wait_until(lambda: measure(server.url)["decoding_requests"] == 1)
    before = measure(server.url)
    if "reset" in how:
        reset(connection)
    else:
        connection.close()
    wait_until_idle(server.url)
    assert slow_steps[0] < 300
    name = f'requests_total{{path="{PATH}",status="%s"}}'
    after = measure(server.url)
    gone = [n for n in (name % 499, name % 200) if after.get(n, 0) > before.get(n, 0)]
    assert gone == [name % 499]
    healthy(server.url)


def test_a_client_that_vanishes_before_its_prompt_is_read_is_removed(
    server, slow_steps
):
    body = ENDLESS | {"prompt": [5] * 400}
    gone = [connect(server.url) for _ in range(8)]
    for connection in gone:
        connection.sendall(request(server.url, PATH, body))
    wait_until(lambda: measure(server.url)["waiting_requests"] > 3)
    for connection in gone:
        reset(connection)
    wait_until_idle(server.url)
    assert post(server.url, {"prompt": "a", "max_tokens": 2})[0] == 200


@pytest.mark.proof
def test_two_hundred_clients_that_vanish(server, small):
    chance = random.Random(0)

    def vanish(n):
        body = ENDLESS | {"stream": n % 2 == 0, "prompt": "x" * chance.randint(1, 300)}
        data = request(server.url, PATH, body)
        connection = connect(server.url)
        with contextlib.suppress(OSError):
            connection.sendall(data[: chance.choice([len(data), len(data) // 2, 9])])
            if chance.random() < 0.3:
                connection.shutdown(socket.SHUT_WR)
            time.sleep(chance.random() * 2)
        (reset if chance.random() < 0.5 else socket.socket.close)(connection)

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(vanish, range(200)))
    wait_until_idle(server.url)
    expected = generate(*small, "The king", GREEDY, template="raw")
    answer = post(server.url, {"prompt": "The king"})[1]
    assert answer["choices"][0]["text"] == expected


# Slow clients --------------------------------------------------------------------


def test_a_client_that_does_not_read_is_given_up(small, monkeypatch):
    monkeypatch.setattr(guard, "CLIENT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(connections, "CLOSE_TIMEOUT_S", 0.3)
    with serving(*small) as server:
        shrink_buffers(server)
        files = f"/proc/{os.getpid()}/fd"
        if not os.path.isdir(files):
            pytest.skip("needs /proc")
        before = len(os.listdir(files))
        stalled = []
        for stream in (True, False):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            host, port = server.url.removeprefix("http://").split(":")
            connection.connect((host, int(port)))
            body = ENDLESS | {"n": 4, "logprobs": 20, "stream": stream}
            connection.sendall(request(server.url, PATH, body | {"max_tokens": 99}))
            stalled.append(connection)
        wait_until_idle(server.url)
        # Only our own ends of the connections are still open.
        wait_until(lambda: len(os.listdir(files)) <= before + 2, seconds=60)
        healthy(server.url)
        for connection in stalled:
            connection.close()


def test_a_slow_writer_is_answered(server):
    data = request(server.url, PATH, {"prompt": "a", "max_tokens": 2})
    with connect(server.url) as connection:
        for n in range(0, len(data), 25):
            connection.sendall(data[n : n + 25])
            time.sleep(0.02)
        assert parse(read_all(connection))[0] == 200


def test_a_slow_reader_receives_all(server):
    body = {"prompt": "The king", "stream": True, "logprobs": 5}
    data = request(server.url, PATH, body)
    with connect(server.url) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(700):
            parts.append(part)
            time.sleep(0.002)
    assert b"".join(parts).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


# Many at once --------------------------------------------------------------------


def test_many_at_once_are_all_answered(server, small):
    prompts = [f"{n % 7} kings" for n in range(70)]  # twice the rows of the engine
    sampling = replace(GREEDY, max_tokens=6)
    expected = {p: generate(*small, p, sampling, template="raw") for p in set(prompts)}
    bodies = [{"prompt": prompt, "max_tokens": 6} for prompt in prompts]
    for prompt, (status, _, body) in zip(
        prompts, ask_together(server.url, bodies), strict=True
    ):
        assert status == 200
        assert json.loads(body)["choices"][0]["text"] == expected[prompt]


def test_the_queue_has_a_limit(small, slow_steps):
    with serving(*small, queue=3, engine={"answers": 2}) as server:
        body = {"prompt": "a", "max_tokens": 12, "logit_bias": {"2": -99}}
        with counting(server.url) as in_engine:
            answers = ask_together(server.url, [body] * 20)
        assert max(in_engine) <= 5
        counts = [status for status, _, _ in answers]
        assert counts.count(200) >= 5
        assert counts.count(200) + counts.count(503) == 20
        for status, headers, content in answers:
            if status == 503:
                assert headers["retry-after"] == "1"
                assert json.loads(content)["error"]["code"] == "overloaded"
        status, answer = post(server.url, body | {"n": 6, "temperature": 1})
        assert (status, answer["error"]["param"]) == (400, "n")  # more than all slots
        assert "6 answers" in answer["error"]["message"]
        assert "at most 5" in answer["error"]["message"]
        assert post(server.url, body | {"n": 5, "temperature": 1})[0] == 200


@pytest.mark.proof
def test_five_hundred_at_once_against_a_queue_of_a_hundred(small, slow_steps):
    with serving(*small, queue=100) as server:
        body = {"prompt": "The king", "max_tokens": 40, "logit_bias": {"2": -99}}
        with counting(server.url) as in_engine:
            answers = ask_together(server.url, [body] * 500)
        assert max(in_engine) <= 132
        texts = set()
        for status, headers, content in answers:
            assert status in (200, 503)
            if status == 200:
                texts.add(json.loads(content)["choices"][0]["text"])
            else:
                assert headers["retry-after"] == "1"
        assert len(texts) == 1
        assert sum(status == 200 for status, _, _ in answers) >= 132


def test_a_late_answer_is_a_timeout(small, slow_steps):
    with serving(*small, timeout_s=0.3) as server:
        status, answer = post(server.url, ENDLESS)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        assert post(server.url, {"prompt": "a", "max_tokens": 2})[0] == 200


def test_large_requests_are_checked_outside_of_the_event_loop(server, monkeypatch):
    in_loop, read = [], app.read_request

    def record(kind, data):
        with contextlib.suppress(RuntimeError):
            in_loop.append(asyncio.get_running_loop())
        return read(kind, data)

    monkeypatch.setattr(app, "read_request", record)
    short = {"prompt": "a", "max_tokens": 1}
    for field in ({"x": "x" * 2**16}, {"stop": ["x"] * 99999}, {"prompt": [5] * 99999}):
        assert post(server.url, short | field)[0] in (200, 400)
    assert in_loop == []
    assert post(server.url, short)[0] == 200
    assert len(in_loop) == 1


@pytest.mark.proof
def test_others_are_answered_while_a_large_request_is_checked(server):
    spellings = {f"{'0' * (n % 9)}5{chr(0x660)}{n}": 0 for n in range(300_000)}
    texts = dict.fromkeys(map(str, range(500_000)), "x")
    bodies = [
        {"prompt": "a", "logit_bias": spellings},
        {"prompt": "a", "logit_bias": texts},
        {"prompt": [[]] * 1_000_000},
        {"prompt": "a", "stop": ["x"] * 1_000_000},
        {"prompt": "a", "x": [[]] * 1_000_000, "max_tokens": 1},
        {"prompt": "a", "regex": "(a|b|c|d){900}" * 9},
    ]
    sent = [json.dumps(body).encode() for body in bodies]
    with ThreadPoolExecutor(len(sent)) as pool:
        large = [pool.submit(post, server.url, body) for body in sent]
        while not all(answer.done() for answer in large):
            healthy(server.url)
        assert {answer.result()[0] for answer in large} <= {200, 400}


# The limit of open files ---------------------------------------------------------


@pytest.mark.proof
def test_the_limit_of_open_files_does_not_stop_the_server():
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, "
        "(100, 100)); sys.argv[0] = 'mlx-openelm'; "
        "runpy.run_module('mlx_openelm', run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", "--port", "0", "--quiet"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = process.stdout.readline().strip()
        idle = [connect(url) for _ in range(300)]
        time.sleep(3)
        for connection in idle:
            connection.close()
        wait_until(lambda: _is_healthy(url))
        assert post(url, {"prompt": "a", "max_tokens": 2})[0] == 200
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143
    assert err.count("\n") < 30  # its loop does not repeat a failure


def _is_healthy(url):
    try:
        return get(url, "/health")[0] == 200
    except (OSError, AssertionError):
        return False


@pytest.mark.proof
def test_memory_does_not_grow_with_requests(small):
    with serving(*small, engine={"answers": 8}) as server:

        def ask(n):
            length = random.Random(n).randint(1, 300)
            return post(server.url, {"prompt": [5 + n % 200] * length, "max_tokens": 3})

        def used():
            pages = Path("/proc/self/statm").read_text().split()[1]
            return int(pages) * resource.getpagesize()

        sizes = []
        for start, end in ((0, 200), (200, 1000)):
            with ThreadPoolExecutor(16) as pool:
                assert {s for s, _ in pool.map(ask, range(start, end))} == {200}
            sizes.append(used())
        assert sizes[1] < 1.1 * sizes[0]
