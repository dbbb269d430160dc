"""A prompt becomes a stream of text."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_openelm.cache import KVCache
from mlx_openelm.device import runs_on_linux_cpu
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model import OpenELM
from mlx_openelm.sampling import Sampling, choose_token, penalize_repetition
from mlx_openelm.tokenizer import Tokenizer, encode_prompt

# Prompt tokens to a forward pass. Small ones save half of the masked scores, which cost
# most on the CPU.
PREFILL_CHUNK = 128 if runs_on_linux_cpu() else 512


@dataclass(frozen=True, slots=True)
class Piece:
    """A bit of the answer, and the figures so far.

    Attributes:
        text: what has become certain since the last piece; may be empty.
        token: the token that was drawn, EOS included.
        finish_reason: None, but in the last piece: "stop" (EOS or a stop text) or
            "length" (max_tokens or the context length).
        prompt_tps: prompt tokens per second, up to the first token.
        generation_tps: tokens per second after the first one.
        peak_memory_bytes: MLX's peak of active memory since the stream began.
    """

    text: str
    token: int
    finish_reason: str | None
    prompt_tokens: int
    generation_tokens: int
    prompt_tps: float
    generation_tps: float
    time_to_first_token_s: float
    peak_memory_bytes: int


def stream(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    sampling: Sampling | None = None,
    *,
    template: str = "auto",
    system: str = "",
) -> Iterator[Piece]:
    """Continue a prompt, token by token.

    Args:
        prompt: a text, which gets the template and one BOS; ids are taken as they are.

    Raises:
        OpenELMError: the prompt is empty or leaves no room in the model's context.
    """
    sampling = sampling or Sampling()
    if isinstance(prompt, str):
        # What a raw prompt ends in was typed by a person, and stays.
        chosen = tokenizer.template if template == "auto" else template
        ids = encode_prompt(
            tokenizer,
            prompt,
            template=template,
            system=system,
            as_trained=chosen not in (None, "raw"),
        )
    else:
        ids = list(prompt)
    budget = _check_room(ids, model, sampling)
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    mx.reset_peak_memory()
    decoder = tokenizer.stream_decoder(after=ids)
    stops = StopTexts(sampling.stop)
    started = time.perf_counter()
    first = 0.0
    for count, token in enumerate(draw_tokens(model, ids, sampling, budget), start=1):
        now = time.perf_counter()
        if count == 1:
            first = now
        ended = token == tokenizer.eos_id
        text = stops.add("" if ended else decoder.add(token))
        finish_reason = "stop" if ended or stops.found else None
        if finish_reason is None and count == budget:
            finish_reason = "length"
        if finish_reason and not stops.found:
            text += stops.add(decoder.finish())
            text += stops.finish()
            finish_reason = "stop" if stops.found else finish_reason
        yield Piece(
            text=text,
            token=token,
            finish_reason=finish_reason,
            prompt_tokens=len(ids),
            generation_tokens=count,
            prompt_tps=len(ids) / (first - started),
            generation_tps=(count - 1) / (now - first) if count > 1 else 0.0,
            time_to_first_token_s=first - started,
            peak_memory_bytes=mx.get_peak_memory(),
        )
        if finish_reason:
            return


def generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    sampling: Sampling | None = None,
    *,
    template: str = "auto",
    system: str = "",
) -> str:
    """Return the whole continuation of a prompt; see `stream`."""
    pieces = stream(
        model, tokenizer, prompt, sampling, template=template, system=system
    )
    return "".join(piece.text for piece in pieces)


class StopTexts:
    """Lets text through until one of the stop texts stands in it.

    What may be the beginning of a stop text is held back, wherever token borders fall.

    Attributes:
        found: whether a stop text was met; nothing comes through after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Return the text that surely stands before any stop text."""
        if self.found:
            return ""
        self._held += text
        hits = [(self._held.find(stop), len(stop)) for stop in self._stops]
        # The stop text that is complete first counts, as if letters came one by one.
        ends = [(place + length, place) for place, length in hits if place >= 0]
        if ends:
            self.found = True
            return self._release(min(ends)[1])
        return self._release(len(self._held) - self._possible_start())

    def finish(self) -> str:
        """Return what was held back, once it is known that nothing follows."""
        return self._release(0 if self.found else len(self._held))

    def _possible_start(self) -> int:
        """The length of the longest tail that is a beginning of a stop text."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


def _check_room(ids: Sequence[int], model: OpenELM, sampling: Sampling) -> int:
    """Return how many tokens may be written."""
    context, rows = model.config.max_context_length, model.config.vocab_size
    if not ids:
        raise OpenELMError("The prompt is empty; it needs at least one token.")
    if min(ids) < 0 or max(ids) >= rows:
        raise OpenELMError(
            f"The prompt holds token ids outside 0 to {rows - 1}, the model's rows."
        )
    if len(ids) >= context:
        raise OpenELMError(
            f"The prompt has {len(ids)} tokens, and the model's context is {context}; "
            "shorten it."
        )
    return min(sampling.max_tokens, context - len(ids))


def draw_tokens(
    model: OpenELM, prompt: Sequence[int], sampling: Sampling, count: int
) -> Iterator[int]:
    """Yield `count` tokens; each next step is queued before a token is read."""
    cache = KVCache.for_model(model)
    penalized = sampling.repetition_penalty != 1.0
    span = min(sampling.repetition_context, model.config.max_context_length)
    recent = mx.array(list(prompt[-span:]))

    def choose(hidden: mx.array) -> mx.array:
        nonlocal recent
        logits = model.head(hidden[:, -1])  # (1, V)
        if penalized:
            logits = penalize_repetition(logits, recent, sampling.repetition_penalty)
        token = choose_token(logits, sampling)  # (1,)
        if penalized:
            recent = mx.concatenate([recent, token])[-span:]
        return token

    token = choose(prefill(model, prompt, cache))
    mx.async_eval(token)
    for left in range(count - 1, -1, -1):
        following = token
        if left:
            following = choose(model.transformer(token[None], cache))
            mx.async_eval(following)
        yield int(token.item())  # type: ignore[arg-type] # it is no complex number
        token = following


def prefill(
    model: OpenELM, prompt: Sequence[int], cache: Sequence[KVCache]
) -> mx.array:
    """Put a prompt into the cache, in chunks; return the last one's hidden states."""
    for start in range(0, len(prompt), PREFILL_CHUNK):
        chunk = mx.array(list(prompt[start : start + PREFILL_CHUNK]))[None]  # (1, T)
        hidden = model.transformer(chunk, cache)  # (1, T, D)
        if start + PREFILL_CHUNK < len(prompt):
            mx.eval([layer.state for layer in cache])
    return hidden
