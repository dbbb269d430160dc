"""The application: the paths of the API and what answers them."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import (
    aclosing,
    contextmanager,
)
from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.batching.sequences import has_passed
from mlx_openelm.generation.constraints import GrammarCompiler
from mlx_openelm.serving.access import Access
from mlx_openelm.serving.answers import ResponseWriter, read_chunks
from mlx_openelm.serving.api import ChatRequest, CompletionRequest, read_request
from mlx_openelm.serving.completions import Choice, Completion, check_completion
from mlx_openelm.serving.engine_thread import EngineThread, TooManyRequestsError
from mlx_openelm.serving.errors import RequestError
from mlx_openelm.serving.guard import (
    BodyReader,
    Guard,
    error_response,
    json_response,
)
from mlx_openelm.serving.logprobs import AnswerChunk
from mlx_openelm.serving.metrics import Metrics
from mlx_openelm.serving.openapi import describe_api
from mlx_openelm.serving.page import page_headers, read_page
from mlx_openelm.serving.responses import StreamedResponse, WholeResponse
from mlx_openelm.serving.served import Served, ServedModel
from mlx_openelm.text.templates import TEMPLATE_NAMES

_LARGE_BODY = 2**16  # bytes; checked outside the event loop

log = logging.getLogger(__name__)

Chunks = AsyncGenerator[tuple[Choice, AnswerChunk], None]


class Service:
    """The handlers of the paths, with what they share."""

    def __init__(self, served: Served, engine: EngineThread, metrics: Metrics) -> None:
        self._served, self._engine, self._metrics = served, engine, metrics
        self._compiler = GrammarCompiler(served.tokenizer, served.vocab_size)
        self._bodies = BodyReader()
        self._checking = asyncio.Lock()  # of slow requests
        self._started = int(time.time())

    async def page(self, request: Request) -> Response:
        return Response(read_page(), headers=page_headers())

    async def health(self, request: Request) -> Response:
        healthy = self._engine.is_healthy
        status = "ok" if healthy else "unavailable"
        return json_response({"status": status}, 200 if healthy else 503)

    async def metrics(self, request: Request) -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self._metrics.render(), media_type=kind)

    async def openapi(self, request: Request) -> Response:
        return json_response(describe_api())

    async def models(self, request: Request) -> Response:
        listed = [self._describe(model) for model in self._served.models.values()]
        return json_response({"object": "list", "data": listed})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._served.models:
            names = ", ".join(map(repr, self._served.models))
            raise RequestError(
                f"No model is called {name[:100]!r}; this server has {names}.",
                status=404,
                code="model_not_found",
            )
        return json_response(self._describe(self._served.models[name]))

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, CompletionRequest)

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, ChatRequest)

    def _describe(self, model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "mlx-openelm",
            "parent": model.parent or None,
            "context_length": self._served.context_length,
            "template": model.template,
            "templates": list(TEMPLATE_NAMES),
            "defaults": asdict(self._served.sampling({})),
        }

    # Completions -----------------------------------------------------------------

    async def _complete(
        self, request: Request, kind: type[CompletionRequest | ChatRequest]
    ) -> Response:
        async with self._bodies.read(request) as body:
            completion = await self._check(kind, body)
        writer = ResponseWriter(completion, self._served.tokenizer)
        places = self._reserve(len(completion.choices))
        if completion.stream:
            return StreamedResponse(self._events(completion, writer), places)
        return WholeResponse(self._collect(completion, writer), places)

    async def _check(
        self, kind: type[CompletionRequest | ChatRequest], body: bytes
    ) -> Completion:
        """Check a request; those that take long in a thread, one after another."""

        def check() -> Completion:
            return check_completion(
                read_request(kind, body), self._served, self._compiler
            )

        if len(body) <= _LARGE_BODY:
            parsed = read_request(kind, body)
            if not parsed.has_grammar:
                return check_completion(parsed, self._served, self._compiler)
        async with self._checking:
            return await run_in_threadpool(check)

    @contextmanager
    def _reserve(self, count: int) -> Iterator[None]:
        """Occupy slots of the engine for so many answers."""
        if not self._engine.is_healthy:
            raise _shutting_down()
        most = self._engine.most_requests
        if count > most:
            raise RequestError(
                f"The request is for {count} answers (prompts times n); this server "
                f"accepts at most {most}.",
                param="n",
            )
        try:
            self._engine.reserve(count)
        except TooManyRequestsError:
            raise RequestError(
                "The queue is full; try again later.", status=503, code="overloaded"
            ) from None
        try:
            yield
        finally:
            self._engine.release(count)

    async def _collect(
        self, completion: Completion, writer: ResponseWriter
    ) -> dict[str, Any]:
        chunks: dict[int, list[AnswerChunk]] = {}
        async with aclosing(self._chunks(completion)) as parts:
            async for choice, chunk in parts:
                chunks.setdefault(choice.index, []).append(chunk)
        return writer.whole(chunks)

    async def _events(
        self, completion: Completion, writer: ResponseWriter
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the documents of a stream."""
        for choice in completion.choices:
            first = writer.start_event(choice)
            if first is not None:
                yield first
        last: dict[int, AnswerChunk] = {}
        async with aclosing(self._chunks(completion)) as parts:
            async for choice, chunk in parts:
                last[choice.index] = chunk
                yield writer.event(choice, chunk)
        if completion.includes_usage:
            yield writer.usage_event(last)

    async def _chunks(self, completion: Completion) -> Chunks:
        """Yield the chunks of all choices as they come.

        Raises:
            RequestError: a choice has failed.
        """
        queue: asyncio.Queue[tuple[Choice, AnswerChunk | Exception]] = asyncio.Queue()

        async def read(choice: Choice) -> None:
            try:
                async for chunk in self._choice_chunks(choice):
                    queue.put_nowait((choice, chunk))
            except Exception as error:
                queue.put_nowait((choice, error))

        tasks = [asyncio.create_task(read(choice)) for choice in completion.choices]
        left = len(tasks)
        try:
            while left:
                choice, chunk = await queue.get()
                if isinstance(chunk, Exception):
                    raise self._public_error(choice, chunk) from chunk
                left -= chunk.finish_reason is not None
                yield choice, chunk
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _choice_chunks(self, choice: Choice) -> AsyncGenerator[AnswerChunk, None]:
        timer = self._metrics.watch_answer()
        async with aclosing(self._engine.answer(choice.request)) as outputs:
            chunk = None
            async for chunk in read_chunks(outputs, choice, self._served.tokenizer):
                timer.update(chunk.count)
                yield chunk
        if chunk is not None:
            timer.conclude(
                prompt=len(choice.request.ids),
                cached=chunk.cached,
                generated=chunk.count,
            )

    def _public_error(self, choice: Choice, error: Exception) -> RequestError:
        if not self._engine.is_healthy:
            return _shutting_down()
        if has_passed(choice.request.deadline):
            return RequestError(
                "The answer was not complete in time.", status=504, code="timeout"
            )
        if isinstance(error, OpenELMError) and error.__cause__ is None:
            # A grammar can exceed the parser's limits in the middle of an answer.
            return RequestError(str(error)[:300], code="failed")
        if not isinstance(error, OpenELMError):
            log.error("A request has failed.", exc_info=error)
        return RequestError(
            f"The server failed at this request: {str(error)[:300]}",
            status=500,
            code="failed",
        )


def _shutting_down() -> RequestError:
    return RequestError(
        "The server is shutting down.", status=503, code="shutting_down"
    )


async def _http_error(request: Request, error: Exception) -> Response:
    """Return errors of the router, such as an unknown path, as JSON."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:100]
    message = f"{error.detail}."
    if error.status_code == 404:
        message = (
            f"There is nothing at {path!r}; POST to /v1/completions or "
            "/v1/chat/completions, or GET /v1/models, /health, /metrics, "
            "/openapi.json or the page at /."
        )
    if error.status_code == 405:
        message = f"{request.method[:20]} is not possible at {path!r}."
    refused = RequestError(message, status=error.status_code, code="not_found")
    response = error_response(refused)
    response.headers.update(error.headers or {})
    return response


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


def build_app(
    served: Served,
    engine: EngineThread,
    metrics: Metrics,
    access: Access,
    *,
    is_loopback: bool,
) -> Starlette:
    """Return the ASGI application.

    Each path of the API is also there without /v1, and with a slash at the end.
    """
    service = Service(served, engine, metrics)
    routes = [
        Route("/", service.page),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
        Route("/openapi.json", service.openapi),
    ]
    for prefix in ("/v1", ""):
        routes += [
            Route(f"{prefix}/completions", service.completions, methods=["POST"]),
            Route(f"{prefix}/chat/completions", service.chat, methods=["POST"]),
            Route(f"{prefix}/models", service.models),
            Route(f"{prefix}/models/{{name:path}}", service.one_model),
        ]
    guard = Middleware(Guard, access=access, is_loopback=is_loopback, metrics=metrics)
    return Starlette(
        routes=routes,
        middleware=[guard],
        exception_handlers={
            HTTPException: _http_error,
            RequestError: _request_error,
        },
    )
