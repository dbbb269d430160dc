"""Measurements of the server for Prometheus, at /metrics."""

import time
from collections.abc import Callable, Iterable

import mlx.core as mx
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from mlx_openelm.generation.batching.sequences import BatchRequest, Output
from mlx_openelm.serving.engine_thread import EngineState

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_RATES = (1, 3, 10, 20, 30, 50, 100, 200, 300, 500, 1000)


class Metrics:
    """The counters of one server."""

    def __init__(self, read_state: Callable[[], EngineState]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "mlx_openelm_requests",
            "Requests by path and HTTP status; 499: the client closed the connection.",
            ("path", "status"),
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "mlx_openelm_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.cached_tokens = Counter(
            "mlx_openelm_cached_prompt_tokens",
            "Tokens of prompts whose keys and values were kept from earlier ones.",
            registry=registry,
        )
        self.generated_tokens = Counter(
            "mlx_openelm_generated_tokens", "Tokens of answers.", registry=registry
        )
        self.time_to_first_token = Histogram(
            "mlx_openelm_time_to_first_token_seconds",
            "Time from the request to its first token, waiting included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokens_per_second = Histogram(
            "mlx_openelm_answer_tokens_per_second",
            "Tokens per second of one answer after its first token.",
            buckets=_RATES,
            registry=registry,
        )
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "waiting_requests": (
                "Answers that wait for their prompt to be processed.",
                lambda: read_state().waiting,
            ),
            "decoding_requests": (
                "Answers that are being generated.",
                lambda: read_state().decoding,
            ),
            "kept_prompt_bytes": (
                "Size of the kept prompts' keys and values.",
                lambda: read_state().kept_bytes,
            ),
            "memory_active_bytes": ("Memory of MLX arrays.", mx.get_active_memory),
            "memory_peak_bytes": ("Highest memory of MLX arrays.", mx.get_peak_memory),
        }
        for name, (text, read) in gauges.items():
            gauge = Gauge(f"mlx_openelm_{name}", text, registry=registry)
            gauge.set_function(read)

    def render(self) -> bytes:
        """Return all values in Prometheus's text format."""
        return generate_latest(self._registry)

    def watch(self, requests: Iterable[BatchRequest]) -> Callable[[Output], None]:
        """Return a function that measures answers by their outputs."""
        timers = {request: _AnswerTimer(self) for request in requests}
        return lambda output: timers[output.request].add(output)


class _AnswerTimer:
    """Measures one answer."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started = self._first = time.perf_counter()
        self._count = 0

    def add(self, output: Output) -> None:
        """Note an output; the last one of a complete answer counts its tokens."""
        if output.token is not None:
            self._count += 1
            if self._count == 1:
                self._first = time.perf_counter()
                self._metrics.time_to_first_token.observe(self._first - self._started)
        if output.finish_reason is None:
            return
        self._metrics.prompt_tokens.inc(len(output.request.ids))
        self._metrics.cached_tokens.inc(output.cached_tokens)
        self._metrics.generated_tokens.inc(self._count)
        if self._count > 1:
            since = time.perf_counter() - self._first
            self._metrics.tokens_per_second.observe(
                (self._count - 1) / max(since, 1e-6)
            )
