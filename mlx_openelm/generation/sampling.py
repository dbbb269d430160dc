"""Logits become the next token.

The filters follow the papers that brought them (top-p: Holtzman et al., 1904.09751;
min-p: Nguyen et al., 2407.01082; repetition penalty: Keskar et al., 1909.05858), in
mlx-lm's order: penalties, top-p, min-p, top-k, temperature. All functions take the
logits (R, V) of many rows, in any float type, and read nothing back to the host.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import mlx.core as mx

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation import penalties


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a text is continued. `temp` 0 is greedy; 0 and 1.0 switch a filter off.

    Attributes:
        max_tokens: tokens to write at most; the context length may end it sooner.
        min_tokens: EOS is not drawn before so many; a stop text still ends the answer.
        repetition_penalty: divides positive and multiplies negative logits of tokens
            among the last `repetition_context` (prompt included).
        no_repeat_ngram: no so many tokens stand twice in prompt and answer; 1: no token
            does. EOS is free, and so is all where every token would be banned.
        logit_bias: (token id, what is added to its logit); -100 bans and 100 forces.
        stop: texts that end the answer; they are not part of it.
        stop_loops: ends the answer where its tail is one block of 1 to 64 tokens so
            many times over, and 16 tokens long or more; 0 is off.
        logprobs: how many of the likeliest tokens are told beside each drawn one, with
            their log-probabilities; 0 is off.
        seed: None leaves MLX's random state as it is.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context: int = 256
    no_repeat_ngram: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_loops: int = 0
    logprobs: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in (*_WHOLE, "temp", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            kind, spelled = (
                (int, "whole number") if name in _WHOLE else (float, "number")
            )
            if not isinstance(value, int | kind) or isinstance(value, bool):
                raise OpenELMError(
                    f"{_flag(name)} is {value!r}; it must be a {spelled}."
                )
        limits = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("min_tokens", self.min_tokens >= 0, "0 (off) or more"),
            ("temp", 0 <= self.temp <= 1e6, "0 to 1e6"),
            ("top_p", 0 <= self.top_p <= 1, "between 0 and 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            (
                "repetition_penalty",
                1e-6 <= self.repetition_penalty <= 1e6,
                "1e-6 to 1e6",
            ),
            ("repetition_context", self.repetition_context >= 1, "at least 1"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "0 (off) or more"),
            (
                "stop_loops",
                self.stop_loops == 0 or self.stop_loops >= 2,
                "0 (off) or at least 2",
            ),
            ("logprobs", 0 <= self.logprobs <= 20, "between 0 and 20"),
            ("seed", 0 <= (self.seed or 0) < 2**64, "between 0 and 2**64 - 1"),
        )
        for name, holds, expected in limits:
            if not holds:
                raise OpenELMError(
                    f"{_flag(name)} is {getattr(self, name)}; it must be {expected}."
                )
        if not all(map(_is_bias, self.logit_bias)):
            raise OpenELMError(
                f"--logit-bias is {self.logit_bias!r}; it must be pairs of a token id "
                "and a number from -1e6 to 1e6."
            )
        if not all(isinstance(text, str) and text for text in self.stop):
            raise OpenELMError("--stop is empty or no text; say what ends the answer.")

    @classmethod
    def from_defaults(
        cls, defaults: Mapping[str, Any], given: Mapping[str, Any] | None = None
    ) -> Self:
        """Merge a model's generation_config.json with what a person said.

        Args:
            defaults: Hugging Face's names: temperature, top_p, top_k, min_p,
                repetition_penalty, no_repeat_ngram_size, max_new_tokens and
                min_new_tokens; the first four are unused while do_sample is false.
            given: our names; None means "not given".
        """
        sampled = defaults.get("do_sample") is True
        found: dict[str, Any] = {}
        for ours, theirs in _HUGGING_FACE.items():
            value = defaults.get(theirs)
            if value is not None and (sampled or ours not in _ONLY_SAMPLED):
                found[ours] = value
        if sampled:
            found.setdefault("temp", 1.0)
        said = {k: v for k, v in (given or {}).items() if v is not None}
        known = {f.name for f in fields(cls)}
        assert said.keys() <= known, said
        try:
            base = cls(**found)
        except OpenELMError as error:
            raise OpenELMError(
                f"The model's generation_config.json: {error}"
            ) from error
        return replace(base, **said)


_HUGGING_FACE = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
}
_ONLY_SAMPLED = ("temp", "top_p", "top_k", "min_p")
_WHOLE = (
    "max_tokens",
    "min_tokens",
    "top_k",
    "repetition_context",
    "no_repeat_ngram",
    "stop_loops",
    "logprobs",
    "seed",
)

_SMALLEST = 1e-6  # what is smaller may be 0 in float32: nothing would be left to draw


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_bias(pair: Any) -> bool:
    match pair:
        case (int(token), int() | float() as value):
            # A larger one, penalized, could leave float32.
            whole = not isinstance(token, bool) and not isinstance(value, bool)
            return whole and token >= 0 and -1e6 <= value <= 1e6
    return False


def history_length(sampling: Sampling, context_length: int) -> int:
    """Return how many of the last tokens `shape_logits` has to see; mostly 0."""
    if sampling.no_repeat_ngram:
        return context_length
    if sampling.repetition_penalty != 1.0:
        return min(sampling.repetition_context, context_length)
    return 0


def shape_logits(
    logits: mx.array,
    history: mx.array,
    sampling: Sampling,
    *,
    written: int | mx.array,
    eos_id: int,
) -> mx.array:
    """Apply bias, min_tokens, repetition penalty and no_repeat_ngram, in this order.

    Args:
        history: (R, L), int32: the last tokens of prompt and answer, the newest at the
            right, -1 where there is none; L is `history_length` or more.
        written: new tokens so far, for all rows or (R,).

    Returns:
        (R, V) in float32; the very same array where nothing is asked.
    """
    may_be_early = isinstance(written, mx.array) or written < sampling.min_tokens
    early = sampling.min_tokens > 0 and may_be_early
    penalized = sampling.repetition_penalty != 1.0
    if not (sampling.logit_bias or early or penalized or sampling.no_repeat_ngram):
        return logits
    logits = logits.astype(mx.float32)
    if sampling.logit_bias:
        logits = penalties.add_bias(logits, sampling.logit_bias)
    if early:
        least = min(sampling.min_tokens, 2**31 - 1)  # what an int32 holds
        logits = penalties.forbid_end(logits, written, least, eos_id)
    if penalized:
        length = min(sampling.repetition_context, history.shape[1])
        recent = history[:, -length:]
        logits = penalties.penalize_repetition(
            logits, recent, sampling.repetition_penalty
        )
    if sampling.no_repeat_ngram:
        logits = penalties.forbid_ngrams(
            logits, history, sampling.no_repeat_ngram, eos_id
        )
    return logits


def choose_tokens(logits: mx.array, sampling: Sampling) -> mx.array:
    """Return a token id for every row, int32 (R,)."""
    if sampling.temp == 0:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    return mx.random.categorical(temper(logits, sampling)).astype(mx.int32)


def distribution(logits: mx.array, sampling: Sampling) -> mx.array:
    """Return the log-probabilities (R, V), float32, that `choose_tokens` draws by."""
    if sampling.temp == 0:
        chosen = mx.argmax(logits, axis=-1, keepdims=True)
        return mx.where(mx.arange(logits.shape[-1]) == chosen, 0.0, -mx.inf)
    tempered = temper(logits, sampling)
    return tempered - mx.logsumexp(tempered, axis=-1, keepdims=True)


def temper(logits: mx.array, sampling: Sampling) -> mx.array:
    """Return the logits (R, V), float32, of what is drawn: filtered, over `temp`."""
    return keep_likely(logits, sampling) / max(sampling.temp, _SMALLEST)


def keep_likely(logits: mx.array, sampling: Sampling) -> mx.array:
    """Set to -inf what top-p, min-p and top-k leave out; float32 (R, V).

    Each filter keeps what is no smaller than a floor, so their order does not matter;
    of equal logits it keeps all or none.
    """
    logits = logits.astype(mx.float32)
    floors = []
    likeliest = logits
    if 0 < sampling.top_k < logits.shape[-1]:
        likeliest = mx.topk(logits, sampling.top_k, axis=-1)  # in no order
        floors.append(likeliest.min(axis=-1, keepdims=True))
    if 0 < sampling.top_p < 1:
        # With top-k, only its few are sorted: a full sort is what costs most here.
        falling = -mx.sort(-likeliest, axis=-1)
        probs = mx.exp(falling - mx.logsumexp(logits, axis=-1, keepdims=True))
        before = mx.cumsum(probs, axis=-1) - probs  # mass of the likelier tokens
        kept = before < max(sampling.top_p, _SMALLEST)
        floors.append(mx.where(kept, falling, mx.inf).min(axis=-1, keepdims=True))
    if sampling.min_p > 0:
        floors.append(logits.max(axis=-1, keepdims=True) + math.log(sampling.min_p))
    for floor in floors:
        logits = mx.where(logits < floor, -mx.inf, logits)
    return logits


def top_logprobs(
    logits: mx.array, tokens: mx.array, count: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Return what the model itself gives the drawn tokens, and the likeliest ones.

    Args:
        logits: (R, V), as the model gave them.
        tokens: (R,), the drawn ones.

    Returns:
        The tokens' log-probabilities (R,), the ids of the `count` likeliest (R, count),
        the likeliest first, and theirs (R, count).
    """
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    ids = mx.argpartition(-logprobs, min(count, logits.shape[-1] - 1), axis=-1)
    ids = ids[:, :count]
    values = mx.take_along_axis(logprobs, ids, axis=-1)
    order = mx.argsort(-values, axis=-1)
    ids, values = (mx.take_along_axis(x, order, axis=-1) for x in (ids, values))
    return chosen, ids.astype(mx.int32), values
