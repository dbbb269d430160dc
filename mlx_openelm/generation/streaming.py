"""Generate text from a prompt, as a stream or as a whole."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import mlx.core as mx

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.constraints import Constraint
from mlx_openelm.generation.decoding import Context, draw_tokens
from mlx_openelm.generation.drafters import Drafter
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.penalties import check_bias
from mlx_openelm.generation.sampling import find_padding
from mlx_openelm.generation.speculation import draw_speculatively
from mlx_openelm.generation.stopping import Answer
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.text.templates import encode_prompt
from mlx_openelm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the answer, and the statistics so far.

    Attributes:
        text: text that is final since the last piece; may be empty.
        token: the token that was drawn, EOS included.
        finish_reason: None, except in the last piece: "stop" (EOS or a stop text),
            "loop" (`Sampling.stop_loops`) or "length" (max_tokens or the context).
        logprob, top_logprobs: see `decoding.Token`.
        cached_tokens: prompt tokens that the context already held.
        prompt_tps: other prompt tokens per second, up to the first new token.
        generation_tps: tokens per second after the first one.
        peak_memory_bytes: MLX's peak of active memory since the stream began.
        drafted_tokens, accepted_tokens: numbers of verified and accepted draft tokens.
    """

    text: str
    token: int
    finish_reason: str | None
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    prompt_tps: float
    generation_tps: float
    time_to_first_token_s: float
    peak_memory_bytes: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


def stream(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    sampling: Sampling | None = None,
    *,
    template: str = "auto",
    system: str = "",
    context: Context | None = None,
    drafter: Drafter | None = None,
    constraint: Constraint | None = None,
) -> Iterator[Piece]:
    """Continue a prompt, token by token.

    Args:
        prompt: a text, which gets the template and one BOS; ids are used unchanged.
        context: its common prefix with the prompt is not processed again; afterwards it
            holds prompt and answer.
        drafter: draft source for speculative decoding, which leaves a greedy answer and
            the distribution of a sampled one unchanged.
        constraint: the grammar that the answer follows; not with a drafter.

    Raises:
        OpenELMError: the prompt is empty or fills the model's context.
    """
    sampling = sampling or Sampling()
    ids = prepare_prompt(tokenizer, prompt, template=template, system=system)
    context = Context(model) if context is None else context
    budget = check_length(ids, model, sampling, slides=context.slides)
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    mx.reset_peak_memory()
    assert drafter is None or constraint is None
    constraint = constraint and constraint.restarted()
    keeps = constraint is not None
    answer = Answer(tokenizer, ids, sampling, budget, keeps_first_space=keeps)
    started = time.perf_counter()
    cached = context.reuse(ids)
    first = 0.0
    drawing: Any = {
        "eos_id": tokenizer.eos_id,
        "padding": find_padding(tokenizer, model.config.vocab_size),
        "context": context,
    }
    if drafter is None:
        drawn = draw_tokens(
            model, ids, sampling, budget, constraint=constraint, **drawing
        )
    else:
        drawn = draw_speculatively(model, ids, sampling, budget, drafter, **drawing)
        drafted, accepted = drafter.drafted, drafter.accepted
    for count, token in enumerate(drawn, start=1):
        now = time.perf_counter()
        if count == 1:
            first = now
        yield Piece(
            text=answer.add(token.id),
            token=token.id,
            finish_reason=answer.finish_reason,
            logprob=token.logprob,
            top_logprobs=token.alternatives,
            prompt_tokens=len(ids),
            cached_tokens=cached,
            generation_tokens=count,
            prompt_tps=(len(ids) - cached) / (first - started),
            generation_tps=(count - 1) / (now - first) if count > 1 else 0.0,
            time_to_first_token_s=first - started,
            peak_memory_bytes=mx.get_peak_memory(),
            drafted_tokens=drafter.drafted - drafted if drafter else 0,
            accepted_tokens=drafter.accepted - accepted if drafter else 0,
        )
        if answer.finish_reason:
            return


def prepare_prompt(
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    template: str = "auto",
    system: str = "",
) -> list[int]:
    """Return a prompt's ids; a text gets the template and one BOS.

    Raises:
        OpenELMError: see `encode_prompt`.
    """
    if not isinstance(prompt, str):
        return list(prompt)
    # The end of a raw prompt was typed by the user and stays unchanged.
    chosen = tokenizer.template if template == "auto" else template
    as_trained = chosen not in (None, "raw")
    return encode_prompt(
        tokenizer, prompt, template=template, system=system, as_trained=as_trained
    )


def generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    sampling: Sampling | None = None,
    *,
    template: str = "auto",
    system: str = "",
    context: Context | None = None,
    drafter: Drafter | None = None,
    constraint: Constraint | None = None,
) -> str:
    """Return the whole continuation of a prompt; see `stream`."""
    pieces = stream(
        model,
        tokenizer,
        prompt,
        sampling,
        template=template,
        system=system,
        context=context,
        drafter=drafter,
        constraint=constraint,
    )
    return "".join(piece.text for piece in pieces)


def check_length(
    ids: Sequence[int], model: OpenELM, sampling: Sampling, *, slides: bool = False
) -> int:
    """Check a prompt; return the maximum number of new tokens.

    Args:
        slides: the cache drops old tokens, so a text may be longer than the context.

    Raises:
        OpenELMError: the prompt is empty, too long, or holds ids out of range.
    """
    context, rows = model.config.max_context_length, model.config.vocab_size
    if not ids:
        raise OpenELMError("The prompt is empty; it needs at least one token.")
    if not all(isinstance(i, Integral) and 0 <= i < rows for i in ids):
        raise OpenELMError(
            "The prompt holds an invalid token id; ids are whole numbers from 0 to "
            f"{rows - 1}."
        )
    check_bias(sampling.logit_bias, rows)
    if slides:
        return sampling.max_tokens
    if len(ids) >= context:
        raise OpenELMError(
            f"The prompt has {len(ids)} tokens, and the model's context is {context}; "
            "shorten it."
        )
    return min(sampling.max_tokens, context - len(ids))
