"""The thread of the engine, between requests."""

import resource
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from servers import post, wait_until

from mlx_openelm.generation.batching.engine import Engine

MIB = 1 << 20


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; glibc keeps memory")
def test_an_idle_server_returns_freed_memory_to_the_system(server):
    blocks = [bytes(64 << 10) for _ in range(1024)]  # 64 MiB
    before = resident_bytes()
    end_of_heap = blocks.pop()  # glibc itself returns only what is free at the end
    del blocks[:]
    post(server.url, {"prompt": "a", "max_tokens": 1})
    wait_until(lambda: resident_bytes() < before - 32 * MIB, seconds=10)
    assert end_of_heap


def test_an_idle_server_empties_the_cache_of_mlx(server):
    mx.eval(mx.zeros(MIB) + 1)
    post(server.url, {"prompt": "a", "max_tokens": 1})
    wait_until(lambda: mx.get_cache_memory() == 0, seconds=10)


def test_a_request_that_cannot_be_added_ends_alone(server, monkeypatch):
    add, errors = Engine.add, [IndexError("no piece")]

    def fail(self, request):
        if errors:
            raise errors.pop()
        add(self, request)

    monkeypatch.setattr(Engine, "add", fail)
    body = {"prompt": "a", "max_tokens": 1}
    status, answer = post(server.url, body)
    assert status == 500
    assert "IndexError: no piece" in answer["error"]["message"]
    status, _ = post(server.url, body)
    assert status == 200
