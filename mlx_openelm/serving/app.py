"""The application: the paths of the API and what answers them."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
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
from mlx_openelm.generation.batching.sequences import BatchRequest, DeadlineError
from mlx_openelm.generation.constraints import GrammarCompiler
from mlx_openelm.serving.access import Access
from mlx_openelm.serving.answers import AnswerChunk, ResponseWriter
from mlx_openelm.serving.api import ChatRequest, CompletionRequest, read_request
from mlx_openelm.serving.completions import Completion, check_completion
from mlx_openelm.serving.engine_thread import (
    Answers,
    EngineThread,
    TooManyRequestsError,
)
from mlx_openelm.serving.errors import RequestError
from mlx_openelm.serving.guard import (
    BodyReader,
    Guard,
    error_response,
    json_response,
)
from mlx_openelm.serving.logprobs import make_speller
from mlx_openelm.serving.metrics import Metrics
from mlx_openelm.serving.openapi import describe_api
from mlx_openelm.serving.page import page_headers, read_page
from mlx_openelm.serving.responses import StreamedResponse, WholeResponse
from mlx_openelm.serving.served import Served, ServedModel
from mlx_openelm.text.templates import TEMPLATE_NAMES

_LARGE_BODY = 2**16  # bytes; checked outside the event loop
_LARGE_CHUNK = 64  # tokens; written outside the event loop

log = logging.getLogger(__name__)


class Service:
    """The handlers of the paths, with what they share."""

    def __init__(self, served: Served, engine: EngineThread, metrics: Metrics) -> None:
        self._served, self._engine, self._metrics = served, engine, metrics
        self._compiler = GrammarCompiler(served.tokenizer, served.vocab_size)
        self._spell = make_speller(served.tokenizer)
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
        writer = ResponseWriter(completion, self._served.tokenizer, self._spell)
        answers = self._start([choice.request for choice in completion.choices])
        if completion.stream:
            return StreamedResponse(self._events(completion, writer, answers), answers)
        return WholeResponse(self._collect(completion, writer, answers), answers)

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

    def _start(self, requests: Sequence[BatchRequest]) -> Answers:
        """Send the requests of a completion to the engine.

        Raises:
            RequestError: they are too many, at this time or at any.
        """
        if not self._engine.is_healthy:
            raise _shutting_down()
        most = self._engine.most_requests
        if len(requests) > most:
            raise RequestError(
                f"The request is for {len(requests)} answers (prompts times n); this "
                f"server accepts at most {most}.",
                param="n",
            )
        try:
            return self._engine.start(requests, self._metrics.watch(requests))
        except TooManyRequestsError:
            raise RequestError(
                "The queue is full; try again later.", status=503, code="overloaded"
            ) from None

    async def _collect(
        self, completion: Completion, writer: ResponseWriter, answers: Answers
    ) -> str:
        """Return a whole response as JSON."""
        chunks: list[AnswerChunk] = []
        with self._public_errors():
            async for output in answers:
                chunks += writer.read(output)
            if completion.logprobs is None:
                return writer.whole(chunks)
            return await run_in_threadpool(writer.whole, chunks)

    async def _events(
        self, completion: Completion, writer: ResponseWriter, answers: Answers
    ) -> AsyncGenerator[str, None]:
        """Yield the documents of a stream as JSON."""

        def write(chunk: AnswerChunk) -> str:
            return json.dumps(writer.event(chunk))

        with self._public_errors():
            for event in writer.start_events():
                yield json.dumps(event)
            async for output in answers:
                for chunk in writer.read(output):
                    if len(chunk.tokens) > _LARGE_CHUNK:
                        yield await run_in_threadpool(write, chunk)
                    else:
                        yield write(chunk)
            if completion.includes_usage:
                yield json.dumps(writer.usage_event())

    @contextmanager
    def _public_errors(self) -> Iterator[None]:
        """Raise RequestError, whatever is raised in the block."""
        try:
            yield
        except Exception as error:
            raise self._public_error(error) from error

    def _public_error(self, error: Exception) -> RequestError:
        if not self._engine.is_healthy:
            return _shutting_down()
        if isinstance(error, DeadlineError):
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
    message, code = f"{error.detail}.", "not_found"
    if error.status_code == 404:
        message = (
            f"There is nothing at {path!r}; POST to /v1/completions or "
            "/v1/chat/completions, or GET /v1/models, /health, /metrics, "
            "/openapi.json or the page at /."
        )
    if error.status_code == 405:
        message = f"{request.method[:20]} is not possible at {path!r}."
        code = "method_not_allowed"
    refused = RequestError(message, status=error.status_code, code=code)
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
