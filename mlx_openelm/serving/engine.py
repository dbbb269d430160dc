"""mlx-lm's generation thread, with our model and our draws.

Its continuous batches and its prompt cache are mlx-lm's. It has no public interface, so
all that is bent of it lies in this module, with the reason; test_server.py holds
that mlx-lm is still what is bent here.

Importing this module imports mlx-lm, which takes seconds: do it inside a function.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any

import mlx.core as mx
import mlx_lm.server as theirs
from mlx_lm.models.cache import LRUPromptCache, trim_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from mlx_openelm.generation.decoding import PREFILL_CHUNK
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.sampling import (
    choose_tokens,
    distribution,
    history_length,
    shape_logits,
)
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.serving.requests import Completion


@dataclass(frozen=True, slots=True)
class Load:
    """How much is done at a time.

    Attributes:
        answers: written at the same time, in one batch.
        prompts: read at the same time.
        kept_prompts: whose keys and values are kept for the next request.
    """

    answers: int = 32
    prompts: int = 4
    kept_prompts: int = 10


class _Provider(theirs.ModelProvider):
    """Has one model and never loads another, whatever a request names."""

    model: Any
    tokenizer: Any
    model_key: Any

    def __init__(self, model: OpenELM, eos_id: int, load: Load) -> None:
        super().__init__(
            Namespace(
                model=None,
                adapter_path=None,
                draft_model=None,
                chat_template=None,
                trust_remote_code=False,
                pipeline=False,
                kv_bits=None,
                decode_concurrency=load.answers,
                prompt_concurrency=load.prompts,
                prefill_step_size=PREFILL_CHUNK,
                prompt_cache_bytes=None,
            )
        )
        self.model, self.tokenizer = model, _Ids(eos_id)
        self.model_key = ("the model that is served", None, None)
        self.is_batchable = True

    def load(self, *names: str | None) -> tuple[OpenELM, "_Ids"]:
        return self.model, self.tokenizer


class _Ids:
    """What mlx-lm asks of a tokenizer where prompts and answers are ids to it.

    Its own detokenizers lose leading spaces and break characters that come in bytes,
    and its stop texts are compared by tokens; `answers.Answer` does both rightly.
    """

    has_chat_template = has_tool_calling = has_thinking = False
    tool_parser = None
    structural_markers: tuple[str, ...] = ()
    response_transitions: Mapping[str, Any] = {}
    last_segment = ""  # from here on, as its own detokenizer

    def __init__(self, eos_id: int) -> None:
        self.eos_token_ids = {eos_id}

    @property
    def detokenizer(self) -> "_Ids":
        return self

    def add_token(self, token: int) -> None:
        pass

    def finalize(self) -> None:
        pass

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> Sequence[int]:
        return ids


class _PromptCache(LRUPromptCache):
    """Always leaves the last token to be run.

    Where a prompt is, token for token, what was kept (an answer that is gone on with),
    mlx-lm's leaves nothing, and its generation thread dies of the empty prompt.
    """

    def fetch_nearest_cache(
        self, model: Any, tokens: list[int]
    ) -> tuple[list[Any] | None, list[int]]:
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if not rest:
            trim_prompt_cache(cache, 1)
        return cache, rest or tokens[-1:]


class Engine(theirs.ResponseGenerator):
    """The thread in which the model runs, for all requests in one batch."""

    def __init__(self, model: OpenELM, eos_id: int, load: Load) -> None:
        self._eos_id = eos_id
        self._context_length = model.config.max_context_length
        # What is not computed yet (an adapter's) can only be so in this thread.
        mx.eval(model.parameters())
        super().__init__(
            _Provider(model, eos_id, load), _PromptCache(load.kept_prompts)
        )

    def answer(
        self, request: Completion, on_progress: Callable[[int, int], None]
    ) -> tuple[theirs.GenerationContext, Iterator[theirs.Response]]:
        """Put a request into the batch; the context's `stop` takes it out."""
        drawing: Any = _Drawing(request, self._eos_id, self._context_length)
        alternatives = request.sampling.logprobs if request.tells_logprobs else 0
        arguments = theirs.GenerationArguments(
            model=theirs.ModelDescription("default_model", "default_model", ""),
            sampling=drawing,  # see _make_sampler
            logits=drawing,  # and _make_logits_processors
            stop_words=[],
            max_tokens=request.sampling.max_tokens,
            num_draft_tokens=0,
            logprobs=request.tells_logprobs,
            top_logprobs=alternatives,
            seed=None,  # with one, mlx-lm serves a request alone
            chat_template_kwargs=None,
        )
        prompt: Any = request.prompt  # ids, see _tokenize
        ids = theirs.CompletionRequest("text", prompt, [], None, None)
        context, responses = self.generate(ids, arguments, on_progress)
        return context, responses

    def _run_generate(self) -> None:
        try:
            super()._run_generate()
        finally:
            # Else MLX takes the thread's streams down after it was joined, and a
            # process that ends meanwhile aborts (seen with mlx 0.32.4 on Linux).
            mx.clear_streams()

    def _tokenize(
        self, tokenizer: _Ids, request: theirs.CompletionRequest, args: Any
    ) -> tuple[list[int], list[list[int]], list[str], str, None]:
        prompt: Any = request.prompt
        return prompt, [prompt], ["assistant"], "normal", None

    def _await_response(self, responses: "Queue[Any]") -> Any:
        while True:  # as mlx-lm's, but half as long, for it is what Ctrl-C waits for
            try:
                return responses.get(timeout=0.5)
            except Empty:
                if self._stop or not self.generation_available():
                    raise RuntimeError("the generation thread has ended") from None


class _Drawing:
    """How one answer is drawn: what `decoding.Drawing` does, within mlx-lm's batch.

    mlx-lm tells the log-probabilities of what its processors return. So ours return
    the model's own logits, and what is asked of them is done where a token is drawn.
    """

    def __init__(self, request: Completion, eos_id: int, context_length: int) -> None:
        self._sampling, self._eos_id = request.sampling, eos_id
        self._history = history_length(request.sampling, context_length)
        self._penalties = make_logits_processors(
            presence_penalty=request.presence_penalty,
            presence_context_size=request.sampling.repetition_context,
            frequency_penalty=request.frequency_penalty,
            frequency_context_size=request.sampling.repetition_context,
        )
        asked = self._history or self._sampling.logit_bias or self._sampling.min_tokens
        self._shapes = bool(asked or self._penalties)
        self._seen: tuple[mx.array, mx.array] | None = None
        self._key: mx.array | None = None
        self._written = 0

    def make_sampler(self) -> Callable[[mx.array], mx.array]:
        if self._sampling.temp == 0 and not self._shapes:
            return _choose_greedily  # one object: mlx-lm then calls it once for all
        if self._sampling.temp > 0 and self._sampling.seed is not None:
            self._key = mx.random.key(self._sampling.seed)
        return self._draw

    def make_processors(self) -> list[Callable[[mx.array, mx.array], mx.array]]:
        return [self._see] if self._shapes else []

    def _see(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Remember the text so far (N,) and the logits (1, V) behind it."""
        self._seen = tokens, logits
        return logits

    def _draw(self, logprobs: mx.array) -> mx.array:
        if self._seen is not None:
            logprobs = self._shape(*self._seen)
        if self._key is None:
            return choose_tokens(logprobs, self._sampling)
        # The keys that MLX's own state goes through behind mx.random.seed.
        self._key, now = mx.random.split(self._key)
        drawn_by = distribution(logprobs, self._sampling)
        return mx.random.categorical(drawn_by, key=now).astype(mx.int32)

    def _shape(self, tokens: mx.array, logits: mx.array) -> mx.array:
        history = tokens[None, -self._history :] if self._history else tokens[None]
        shaped = shape_logits(
            logits,
            history,
            self._sampling,
            written=self._written,
            eos_id=self._eos_id,
        )
        self._written += 1
        for penalize in self._penalties:
            shaped = penalize(tokens, shaped)
        return shaped


def _choose_greedily(logprobs: mx.array) -> mx.array:
    return choose_tokens(logprobs, Sampling())


@contextmanager
def our_draws() -> Iterator[None]:
    """Let mlx-lm's batches draw as `generate` does.

    Its own functions draw otherwise: the penalty looks 20 tokens back, a seed takes a
    request out of the batch, a top_k beyond the vocabulary ends the thread, and on the
    Linux CPU they are compiled, for 13 s before the first token.
    """
    kept = theirs._make_sampler, theirs._make_logits_processors
    theirs._make_sampler = lambda args, tokenizer: args.sampling.make_sampler()
    theirs._make_logits_processors = lambda args: args.logits.make_processors()
    try:
        yield
    finally:
        theirs._make_sampler, theirs._make_logits_processors = kept
