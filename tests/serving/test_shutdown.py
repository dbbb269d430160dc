"""How the command `serve` starts and ends."""

import asyncio
import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import mlx.core as mx
import pytest
import uvicorn
from models import make_factors, weights_of, write_mlx_lm_adapter
from places import ROOT
from servers import (
    connect,
    events,
    get,
    healthy,
    parse,
    post,
    read_all,
    request,
    serving,
    wait_until,
)

from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import generate
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.serving import server as server_module
from mlx_openelm.serving.engine_thread import EngineThread
from mlx_openelm.storage.hub import demo_folder
from mlx_openelm.storage.loading import load
from mlx_openelm.storage.model_folder import open_folder

LONG = {"prompt": "a", "max_tokens": 500, "logit_bias": {"2": -99}}


def serve(*args, environment=None, **options):
    """Start the command; return the process, whose first line is the URL."""
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_openelm", "serve", "--port", "0", *args],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def start_answers(pool, url, count, **options):
    """Send requests that take long; return the futures of their responses."""

    def ask(data):
        with connect(url) as connection:
            connection.sendall(data)
            try:
                return parse(read_all(connection))
            except ConnectionResetError:
                return None

    bodies = [LONG | options | {"stream": n % 2 == 0} for n in range(count)]
    return [pool.submit(ask, request(url, "/v1/completions", b)) for b in bodies]


@pytest.mark.parametrize(
    ("number", "code", "length"),
    [
        pytest.param("SIGINT", 130, 60, marks=pytest.mark.proof),
        ("SIGTERM", 143, 60),
        pytest.param("SIGTERM", 143, 1000, marks=pytest.mark.proof),
    ],
)
def test_a_signal_ends_the_server_and_clients_are_answered(
    tmp_path, number, code, length
):
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
        given = {"max_tokens": 9, "seed": 5, "temp": 0.7}
        sampling = Sampling.from_defaults(defaults, given)
        expected = generate(*load("demo", adapter), "The king", sampling)
        assert (status, answer["choices"][0]["text"]) == (200, expected)
        with ThreadPoolExecutor(12) as pool:
            answers = start_answers(pool, url, 12, max_tokens=length)
            time.sleep(0.3)
            process.send_signal(getattr(signal, number))
            out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err
    for status, headers, body in (answer.result() for answer in answers):
        if headers["content-type"].startswith("text/event-stream"):
            last = events(body)[-1]
        else:
            last = json.loads(body)
        whole = last == "[DONE]" or (status == 200 and "choices" in last)
        assert whole or last["error"]["code"] == "shutting_down"


def test_a_second_signal_ends_the_server_at_once():
    process = serve("--quiet")
    try:
        url = process.stdout.readline().strip()
        with ExitStack() as stack:
            clients = [stack.enter_context(connect(url)) for _ in range(12)]
            for client in clients:
                client.sendall(request(url, "/v1/completions", LONG | {"stream": True}))
            for client in clients:
                client.recv(1)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: refuses(url))
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
            # The answers do not end, neither by themselves nor with an error.
            assert not all(
                b"[DONE]" in data or b"shutting_down" in data
                for data in map(read_to_the_end, clients)
            )
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (143, "")


def refuses(url):
    try:
        connect(url).close()
    except OSError:
        return True
    return False


def read_to_the_end(connection):
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    return data


def test_the_grace_period_ends_answers(small, monkeypatch):
    monkeypatch.setattr(server_module, "SHUTDOWN_GRACE_S", 0.3)
    call = type(small[0].transformer).__call__

    def slow(*args, **options):
        time.sleep(0.05)
        return call(*args, **options)

    monkeypatch.setattr(type(small[0].transformer), "__call__", slow)
    with ThreadPoolExecutor(4) as pool, serving(*small) as server:
        answers = start_answers(pool, server.url, 4)
        time.sleep(0.4)
        server.stop()
        # New requests are refused while those in progress may end.
        ended = [answer.result() for answer in answers]
    for n, (status, _, body) in enumerate(ended):
        last = json.loads(body) if n % 2 else events(body)[-1]
        assert last["error"]["code"] == "shutting_down"
        assert status == (503 if n % 2 else 200)


def test_idle_connections_do_not_delay_the_end(small, monkeypatch):
    events, fail_all = [], EngineThread.fail_all

    def record(self, error):
        events.append("the grace period ends")
        fail_all(self, error)

    monkeypatch.setattr(EngineThread, "fail_all", record)
    with serving(*small) as server:
        idle = [connect(server.url) for _ in range(3)]
        idle[0].sendall(b"GET /health HTTP/1.1\r\nHo")
        healthy(server.url)
    assert events == []
    for one in idle:
        one.close()


@pytest.mark.parametrize("fails", [False, True])
def test_the_end_of_the_engine_is_awaited_outside_of_the_event_loop(
    small, monkeypatch, fails
):
    loops, close = [], EngineThread.close

    def record(self):
        with contextlib.suppress(RuntimeError):
            loops.append(asyncio.get_running_loop())
        close(self)
        loops.append("ended")

    async def fail(self, sockets):
        await uvicorn.Server.serve(self, sockets)
        raise OSError("a late failure")

    monkeypatch.setattr(EngineThread, "close", record)
    if fails:
        monkeypatch.setattr(server_module._Uvicorn, "serve", fail)
    with serving(*small) as server:
        pass
    assert loops == ["ended"]
    assert len(server.failed) == fails


def test_errors_of_the_event_loop_are_logged_and_those_of_its_limit_seldom(caplog):
    full = {"exception": OSError(errno.EMFILE, "full"), "socket": None}
    own = {"message": "a task has failed", "exception": ValueError("x")}

    async def report():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(server_module._make_error_handler())
        for _ in range(3):
            loop.call_exception_handler({"message": "cannot accept", **full})
            loop.call_exception_handler(own)

    asyncio.run(report())
    messages = [record.getMessage() for record in caplog.records]
    assert sum("cannot accept" in message for message in messages) == 1
    assert sum("a task has failed" in message for message in messages) == 3


def test_the_key_of_the_environment_is_used_and_not_shown():
    environment = {"MLX_OPENELM_API_KEY": "secret-key"}
    process = serve("--log-level", "debug", environment=environment)
    try:
        url = process.stdout.readline().strip()
        assert get(url, "/v1/models")[0] == 401
        assert get(url, "/v1/models", Authorization="Bearer secret-key")[0] == 200
        shown = subprocess.run(
            ["ps", "-ww", "-o", "args=", "-p", str(process.pid)],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert "GET /v1/models 401" in err
    assert "secret-key" not in shown + out + err


def test_a_server_whose_engine_has_failed_ends(small, monkeypatch, caplog):
    def fail(self):
        raise MemoryError("out of memory")

    with serving(*small) as server:
        engine = "mlx_openelm.generation.batching.engine.Engine.step"
        monkeypatch.setattr(engine, fail)
        assert post(server.url, {"prompt": "a"})[0] == 503
        wait_until(lambda: bool(server.failed))
        assert "The engine has failed" in str(server.failed)
    assert "out of memory" in caplog.text


def test_a_failing_model_ends_its_requests_alone(small, caplog):
    class Failing(OpenELM):
        fails = True

        def head(self, hidden):
            if self.fails:
                raise MemoryError("out of memory")
            return super().head(hidden)

    model = Failing(small[0].config)
    mx.eval(model.parameters())
    with serving(model, small[1]) as server:
        status, answer = post(server.url, {"prompt": "a"})
        assert (status, answer["error"]["code"]) == (500, "failed")
        assert "out of memory" in answer["error"]["message"]
        model.fails = False
        assert post(server.url, {"prompt": "a"})[0] == 200


def test_the_engines_thread_removes_its_streams(small, monkeypatch):
    # Else a process that ends at that moment aborts, in about a third of all cases.
    threads, clear = [], mx.clear_streams

    def record():
        threads.append(threading.current_thread().name)
        clear()

    monkeypatch.setattr(mx, "clear_streams", record)
    with serving(*small) as server:
        assert post(server.url, {"prompt": "a", "max_tokens": 2})[0] == 200
    assert threads == ["engine"]
