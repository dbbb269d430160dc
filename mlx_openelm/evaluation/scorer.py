"""What evaluates a model: answers to the requests of lm-evaluation-harness.

Requests are texts, so that models with other tokenizers get the same ones. `OpenELM`'s
scorer is here, those of other models are in `other_models`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.loglikelihood import (
    Request,
    check_request,
    encode_requests,
    rolling_requests,
    score_requests,
)
from mlx_openelm.generation.batching.answering import (
    BATCH_SIZE,
    BatchPrompt,
    answer_together,
)
from mlx_openelm.generation.options import Sampling
from mlx_openelm.model.fingerprint import fingerprint_model
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # for tasks that set no limit; the harness's own default
SEED = 1234  # of sampled answers

Pair = tuple[str, str]  # context and continuation
Score = tuple[float, bool]  # log-likelihood in nats; whether it is the greedy text


class Scorer(Protocol):
    """A model that is evaluated.

    Requests are given by number and are answered in any order.
    """

    @property
    def key(self) -> str:
        """Identifies the weights, so that answers of another model are not reused."""

    def check(self, pairs: Sequence[Pair]) -> list[Any]:
        """Return how pairs are encoded, as JSON values that identify their answers.

        Raises:
            OpenELMError: a pair cannot be scored.
        """

    def score(self, pairs: Mapping[int, Pair]) -> Iterator[tuple[int, Score]]:
        """Yield the log-likelihood of each continuation after its context."""

    def score_texts(
        self, texts: Mapping[int, tuple[str]]
    ) -> Iterator[tuple[int, float]]:
        """Yield the log-likelihood of each text, in windows of the context length."""

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens that `score_texts` predicts."""

    def generate(
        self, prompts: Mapping[int, tuple[str, Mapping[str, Any]]]
    ) -> Iterator[tuple[int, str]]:
        """Yield the continuation of each prompt, by the harness's generation_kwargs."""


class OpenELMScorer:
    """Scores with our model. Every text begins with BOS; there is no chat template."""

    def __init__(
        self, model: OpenELM, tokenizer: Tokenizer, *, batch_size: int = BATCH_SIZE
    ) -> None:
        """Store the arguments.

        Args:
            batch_size: number of answers that are generated together.
        """
        self._model, self._tokenizer = model, tokenizer
        self._batch_size = batch_size

    @cached_property
    def key(self) -> str:
        return fingerprint_model(self._model)

    def check(self, pairs: Sequence[Pair]) -> list[Any]:
        requests = self._encode(pairs)
        for request in requests:
            check_request(request, self._model)
        return [[request.context, request.continuation] for request in requests]

    def score(self, pairs: Mapping[int, Pair]) -> Iterator[tuple[int, Score]]:
        numbers = list(pairs)
        requests = self._encode(list(pairs.values()))
        for index, score in score_requests(self._model, requests):
            yield numbers[index], (score.nats, score.is_greedy)

    def score_texts(
        self, texts: Mapping[int, tuple[str]]
    ) -> Iterator[tuple[int, float]]:
        requests, owners = [], []
        for number, (text,) in texts.items():
            ids = self._tokenizer.encode(text, bos=False)
            windows = rolling_requests(
                ids, self._tokenizer.bos_id, self._model.config.max_context_length
            )
            requests += windows
            owners += [number] * len(windows)
        waiting = Counter(owners)
        nats = dict.fromkeys(texts, 0.0)
        yield from ((number, 0.0) for number in texts if not waiting[number])
        for index, score in score_requests(self._model, requests):
            owner = owners[index]
            nats[owner] += score.nats
            waiting[owner] -= 1
            if not waiting[owner]:
                yield owner, nats[owner]

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, bos=False))

    def generate(
        self, prompts: Mapping[int, tuple[str, Mapping[str, Any]]]
    ) -> Iterator[tuple[int, str]]:
        for members, sampling in group_by_settings(prompts):
            context = self._model.config.max_context_length
            prompt_limit = context - sampling.max_tokens
            if prompt_limit < 1:
                raise OpenELMError(
                    f"The task needs {sampling.max_tokens} new tokens, and the model's "
                    f"context is {context}; choose another task."
                )
            numbered = (  # truncated at the left, as by the harness
                BatchPrompt(
                    number, self._tokenizer.encode(prompts[number][0])[-prompt_limit:]
                )
                for number in members
            )
            for answer in answer_together(
                self._model,
                self._tokenizer,
                numbered,
                sampling,
                batch_size=self._batch_size,
            ):
                yield answer.prompt.number, answer.text

    def _encode(self, pairs: Sequence[Pair]) -> list[Request]:
        return encode_requests(self._tokenizer, pairs)


def group_by_settings(
    prompts: Mapping[int, tuple[str, Mapping[str, Any]]],
) -> Iterator[tuple[list[int], Sampling]]:
    """Yield the numbers of prompts with equal generation_kwargs, and these settings."""
    groups: dict[str, list[int]] = {}
    for number, (_, settings) in prompts.items():
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(number)
    for members in groups.values():
        yield members, _read_settings(prompts[members[0]][1])


def _read_settings(settings: Mapping[str, Any]) -> Sampling:
    """Convert a task's generation_kwargs; greedy unless `do_sample` is set."""
    from lm_eval.models.utils import (  # type: ignore[import-untyped] # it has no stubs
        normalize_gen_kwargs,
    )

    kwargs = normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS)
    sampled = {}
    if kwargs["do_sample"] and kwargs["temperature"]:
        sampled = {
            ours: kwargs[theirs]
            for ours, theirs in (
                *(("temp", "temperature"), ("top_p", "top_p")),
                *(("top_k", "top_k"), ("min_p", "min_p")),
            )
            if kwargs.get(theirs) is not None
        }
    try:
        return Sampling(
            max_tokens=kwargs["max_gen_toks"],
            stop=tuple(text for text in kwargs["until"] if text),
            repetition_penalty=kwargs.get("repetition_penalty") or 1.0,
            seed=SEED,
            **sampled,
        )
    except OpenELMError as error:
        raise OpenELMError(f"Its generation_kwargs are invalid: {error}") from error
