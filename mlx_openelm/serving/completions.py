"""From a request of the API to requests of the engine, one for each choice."""

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.batching.sequences import (
    BatchRequest,
    hashed_keys,
    seeded_keys,
)
from mlx_openelm.generation.constraints import GrammarCompiler
from mlx_openelm.generation.options import Sampling
from mlx_openelm.message_parts import count_of
from mlx_openelm.serving.api import (
    MOST_CHOICES,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    show,
)
from mlx_openelm.serving.errors import RequestError
from mlx_openelm.serving.grammars import compile_grammar
from mlx_openelm.serving.prompts import read_messages, read_prompts
from mlx_openelm.serving.served import Served, ServedModel
from mlx_openelm.text.templates import RAW
from mlx_openelm.text.tokenizer import EOS_TEXT

_UNBOUNDED = 2**31 - 1
_SAMPLING = {  # field of the request -> attribute of Sampling
    "min_tokens": "min_tokens",
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "repetition_context_size": "repetition_context",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer of a completion.

    Attributes:
        prompt: index of its prompt, whose tokens are counted once.
        echo: text that comes before the answer.
    """

    index: int
    prompt: int
    request: BatchRequest
    drops_space: bool
    echo: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A checked request.

    Attributes:
        logprobs: number of alternatives to report with each token; None: report
            no log-probabilities.
    """

    model: str
    is_chat: bool
    choices: tuple[Choice, ...]
    logprobs: int | None
    stream: bool
    includes_usage: bool


def check_completion(
    request: CompletionRequest | ChatRequest, served: Served, compiler: GrammarCompiler
) -> Completion:
    """Check a request against the models that are served.

    Raises:
        RequestError: it cannot be fulfilled, and why.
    """
    model = _find_model(request.model, served)
    sampling = _read_sampling(request, served)
    constraint = compile_grammar(request, compiler)
    if isinstance(request, ChatRequest):
        prompts = [read_messages(request, served, model)]
        if (request.template or model.template) != RAW:
            # An answer that spells the text of EOS ends there.
            sampling = replace(sampling, stop=(*sampling.stop, EOS_TEXT))
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
    else:
        prompts = read_prompts(request.prompt, served, has_text=bool(request.echo))
        logprobs = _read_logprobs(request)
    if logprobs is not None:
        sampling = replace(sampling, logprobs=max(1, logprobs))
    scores = isinstance(request, CompletionRequest) and bool(request.echo)
    deadline = None
    if served.timeout_s is not None:
        deadline = time.monotonic() + served.timeout_s

    def choices() -> Iterator[Choice]:
        count = request.n or 1
        seed = sampling.seed
        for number, prompt in enumerate(prompts):
            for place in range(count):
                index = number * count + place
                if seed is None:
                    keys = hashed_keys(secrets.randbits(64), 0)
                else:  # the first choice is that of `generate` with this seed
                    keys = hashed_keys(seed, index) if index else seeded_keys(seed)
                yield Choice(
                    index=index,
                    prompt=number,
                    request=BatchRequest(
                        prompt.ids,
                        sampling,
                        keys,
                        model=model.name,
                        constraint=constraint and constraint.copy(),
                        deadline=deadline,
                        draws_as_alone=seed is not None and index == 0,
                        scores_prompt=scores and logprobs is not None,
                        generates=request.most_tokens != 0,
                    ),
                    drops_space=prompt.drops_space,
                    echo=prompt.text if scores else "",
                )

    if len(prompts) * (request.n or 1) > MOST_CHOICES:
        raise RequestError(
            f"{count_of(len(prompts), 'prompt')} with n = {request.n} would be more "
            f"than {MOST_CHOICES} answers.",
            param="n",
        )
    return Completion(
        model=model.name,
        is_chat=isinstance(request, ChatRequest),
        choices=tuple(choices()),
        logprobs=logprobs,
        stream=bool(request.stream),
        includes_usage=request.includes_usage,
    )


def _find_model(name: str | None, served: Served) -> ServedModel:
    if name in (None, "", "default_model"):
        return served.base
    if name not in served.models:
        raise RequestError(
            f"No model is called {show(name)}; this server has "
            f"{', '.join(map(repr, served.models))}.",
            status=404,
            code="model_not_found",
            param="model",
        )
    return served.models[str(name)]


def _read_sampling(request: GenerationRequest, served: Served) -> Sampling:
    requested: dict[str, Any] = {}
    for field, attribute in _SAMPLING.items():
        value = getattr(request, field)
        if value is not None:
            requested[attribute] = value
    context = served.context_length
    if requested.get("repetition_penalty") == 0:
        requested["repetition_penalty"] = 1.0  # mlx-lm's "off"
    if requested.get("seed") == -1:
        del requested["seed"]
    if requested.get("top_k") == -1:
        requested["top_k"] = 0
    if "repetition_context" in requested:
        size = requested["repetition_context"]
        if size == 0:
            raise RequestError(
                "repetition_context_size is 0; it must be -1 (all tokens) or more "
                "than 0.",
                param="repetition_context_size",
            )
        requested["repetition_context"] = min(size, context) if size > 0 else context
    most = request.most_tokens
    if most == 0 and not (isinstance(request, CompletionRequest) and request.echo):
        raise RequestError(
            "max_tokens is 0; it must be 1 or more, or -1 for no limit.",
            param="max_tokens",
        )
    if most is not None:
        requested["max_tokens"] = min(most, _UNBOUNDED) if most > 0 else _UNBOUNDED
    if request.stops:
        requested["stop"] = request.stops
    if request.logit_bias:
        requested["logit_bias"] = tuple(
            (int(token), bias) for token, bias in request.logit_bias.items()
        )
        if any(token >= served.vocab_size for token, _ in requested["logit_bias"]):
            raise RequestError(
                f"logit_bias must name tokens of the model, 0 to "
                f"{served.vocab_size - 1}.",
                param="logit_bias",
            )
    try:
        return served.sampling(requested)
    except OpenELMError as error:
        raise RequestError(str(error)[:300]) from None


def _read_logprobs(request: CompletionRequest) -> int | None:
    """Read OpenAI's two ways to ask: a flag and a count, or a count alone."""
    if request.logprobs is None or request.logprobs is False:
        return None
    if request.logprobs is True:
        return request.top_logprobs or 0
    return request.logprobs
