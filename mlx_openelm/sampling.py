"""Logits become the next token.

The filters follow the papers that brought them (top-p: Holtzman et al., 1904.09751;
min-p: Nguyen et al., 2407.01082; repetition penalty: Keskar et al., 1909.05858), in
mlx-lm's order: penalty, top-p, min-p, top-k, temperature.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import mlx.core as mx

from mlx_openelm.errors import OpenELMError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a text is continued. `temp` 0 is greedy; 0 and 1.0 switch a filter off.

    Attributes:
        max_tokens: tokens to write at most; the context length may end it sooner.
        repetition_penalty: divides positive and multiplies negative logits of tokens
            among the last `repetition_context` (prompt included).
        stop: texts that end the answer; they are not part of it.
        seed: None leaves MLX's random state as it is.
    """

    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in (*_WHOLE, "temp", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            kind, spelled = (
                (int, "whole number") if name in _WHOLE else (float, "number")
            )
            if not isinstance(value, int | kind) or isinstance(value, bool):
                raise OpenELMError(
                    f"{_flag(name)} is {value!r}; it must be a {spelled}."
                )
        limits = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temp", 0 <= self.temp < float("inf"), "0 or more"),
            ("top_p", 0 <= self.top_p <= 1, "between 0 and 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            (
                "repetition_penalty",
                1e-6 <= self.repetition_penalty <= 1e6,
                "1e-6 to 1e6",
            ),
            ("repetition_context", self.repetition_context >= 1, "at least 1"),
            ("seed", 0 <= (self.seed or 0) < 2**64, "between 0 and 2**64 - 1"),
        )
        for name, holds, expected in limits:
            if not holds:
                raise OpenELMError(
                    f"{_flag(name)} is {getattr(self, name)}; it must be {expected}."
                )
        if any(not text for text in self.stop):
            raise OpenELMError("--stop is empty; say the text that ends the answer.")

    @classmethod
    def from_defaults(
        cls, defaults: Mapping[str, Any], given: Mapping[str, Any] | None = None
    ) -> Self:
        """Merge a model's generation_config.json with what a person said.

        Args:
            defaults: Hugging Face's names: temperature, top_p, top_k, min_p,
                repetition_penalty, max_new_tokens; unused while do_sample is false.
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
    "max_tokens": "max_new_tokens",
}
_ONLY_SAMPLED = ("temp", "top_p", "top_k", "min_p")
_WHOLE = ("max_tokens", "top_k", "repetition_context")

_SMALLEST = 1e-6  # what is smaller may be 0 in float16: nothing would be left to draw


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def choose_token(logits: mx.array, sampling: Sampling) -> mx.array:
    """Return a token id, int32 (1,), for one position's logits (1, V)."""
    if sampling.temp == 0:
        return mx.argmax(logits, axis=-1)
    likely = keep_likely(logits, sampling).astype(mx.float32)
    return mx.random.categorical(likely / max(sampling.temp, _SMALLEST))


def keep_likely(logits: mx.array, sampling: Sampling) -> mx.array:
    """Set to -inf what top-p, min-p and top-k leave out; logits are (1, V)."""
    lowest = -mx.inf
    if 0 < sampling.top_p < 1:
        share = max(sampling.top_p, _SMALLEST)
        order = mx.argsort(-logits, axis=-1)
        probs = mx.softmax(mx.take_along_axis(logits, order, axis=-1), precise=True)
        before = mx.cumsum(probs, axis=-1) - probs  # mass of the likelier tokens
        kept = mx.put_along_axis(
            mx.zeros(logits.shape, mx.bool_), order, before < share, axis=-1
        )
        logits = mx.where(kept, logits, lowest)
    if sampling.min_p > 0:
        floor = logits.max(axis=-1, keepdims=True) + mx.log(mx.array(sampling.min_p))
        logits = mx.where(logits < floor, lowest, logits)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = mx.topk(logits, sampling.top_k, axis=-1).min(axis=-1, keepdims=True)
        logits = mx.where(logits < kth, lowest, logits)
    return logits


def penalize_repetition(logits: mx.array, recent: mx.array, penalty: float) -> mx.array:
    """Make the `recent` tokens (N,) less likely; logits are (1, V)."""
    places = recent[None].astype(mx.int32)
    picked = mx.take_along_axis(logits, places, axis=-1)
    picked = mx.where(picked > 0, picked / penalty, picked * penalty)
    return mx.put_along_axis(logits, places, picked, axis=-1)
