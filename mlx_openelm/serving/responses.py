"""Responses to completions: streams of events, and whole documents."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_openelm.serving.engine_thread import Answers
from mlx_openelm.serving.errors import RequestError
from mlx_openelm.serving.guard import ClientGoneError

_KEEP_ALIVE_S = 5.0  # between two parts of a stream
_PROBE_S = 0.5  # between two bytes to a client that has closed its sending side

_PART_BYTES = 2**16  # of a document; the client has a time limit for each part


class StreamedResponse(Response):
    """Server-sent events."""

    def __init__(self, events: AsyncGenerator[str, None], answers: Answers) -> None:
        """Prepare to send events, JSON documents made of the answers."""
        super().__init__()
        self._events, self._answers = events, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._answers:
            await self._send_all(receive, send)

    async def _send_all(self, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        lines = _with_keep_alive(self._lines())
        async with _until_disconnected(receive):
            async with aclosing(lines):
                async for line in lines:
                    body = line.encode()
                    await send(
                        {"type": "http.response.body", "body": body, "more_body": True}
                    )
            await send({"type": "http.response.body", "body": b""})

    async def _lines(self) -> AsyncGenerator[str, None]:
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    yield f"data: {event}\n\n"
        except RequestError as error:
            yield f"data: {json.dumps(error.as_json())}\n\n"
        else:
            yield "data: [DONE]\n\n"


class WholeResponse(Response):
    """One JSON document, when it is complete."""

    def __init__(self, document: Coroutine[Any, Any, str], answers: Answers) -> None:
        """Prepare to send a JSON document made of the answers."""
        super().__init__()
        self._document, self._answers = document, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._answers:
                await self._send_all(scope, receive, send)
        finally:
            self._document.close()  # if it was not awaited

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(self._document)
        started = False
        try:
            async with _until_disconnected(receive):
                while not task.done():
                    await asyncio.wait({task}, timeout=_PROBE_S)
                    if scope.get("half_closed") and not task.done():
                        # Whether such a client still reads is seen when it is sent
                        # something: a space, which JSON allows in front.
                        if not started:
                            await send(_start_json(200))
                        started = True
                        await send(_part(b" "))
                try:
                    status, body = 200, await task
                except RequestError as error:
                    status, body = error.status, json.dumps(error.as_json())
                data = body.encode()
                if not started:
                    await send(_start_json(status, len(data)))
                for start in range(0, len(data), _PART_BYTES):
                    await send(_part(data[start : start + _PART_BYTES]))
                await send({"type": "http.response.body", "body": b""})
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _start_json(status: int, length: int | None = None) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json")]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": status, "headers": headers}


def _part(body: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": True}


@asynccontextmanager
async def _until_disconnected(receive: Receive) -> AsyncIterator[None]:
    """Run a block, and end it with ClientGoneError when the client disconnects."""
    current = asyncio.current_task()
    assert current is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        current.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone:
            current.uncancel()
            raise ClientGoneError from None
        raise
    finally:
        watcher.cancel()


async def _with_keep_alive(
    lines: AsyncGenerator[str, None],
) -> AsyncGenerator[str, None]:
    """Yield lines, and a comment where there is none for a while; close them."""
    following = asyncio.ensure_future(anext(lines))
    try:
        while True:
            await asyncio.wait({following}, timeout=_KEEP_ALIVE_S)
            if not following.done():
                yield ": keep-alive\n\n"
                continue
            try:
                line = following.result()
            except StopAsyncIteration:
                return
            following = asyncio.ensure_future(anext(lines))
            yield line
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await lines.aclose()
