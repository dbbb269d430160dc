"""Options of text generation.

This module imports neither mlx nor numpy, so that the command line starts fast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import find_unpaired_surrogate
from mlx_openelm.options import check_options, option

MODELS = "the model's, else {default}"  # of generation_config.json
SAMPLING = "Sampling"  # headings in --help
SPEED_AND_MEMORY = "Speed and memory"
PROMPT = "Prompt"
STRUCTURED_OUTPUT = "Structured output"
SHOWN_DIGITS = {  # decimals of measured figures in JSON
    "prompt_tps": 2,
    "generation_tps": 2,
    "time_to_first_token_s": 4,
}


def _read_biases(texts: Sequence[str]) -> tuple[tuple[int, float], ...]:
    """Parse the values of the `logit_bias` flag into token ids and biases."""
    pairs = []
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            pairs.append((int(token), float(bias)))
        except ValueError as error:
            raise OpenELMError(
                f"`logit_bias` is {text!r}; it must be ID=BIAS, 42=-5 for example."
            ) from error
    return tuple(pairs)


def _as_tuples(value: Any) -> Any:
    """Return a list, and the lists in it, as tuples; another value unchanged."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _is_bias(pair: Any) -> bool:
    match pair:
        case (int(token), int() | float() as value):
            # A larger value could overflow float32 once it is penalized.
            whole = not isinstance(token, bool) and not isinstance(value, bool)
            return whole and token >= 0 and -1e6 <= value <= 1e6
    return False


@dataclass(frozen=True, slots=True)
class Sampling:
    """Options of decoding. `temp` 0 is greedy; 0 or 1.0 switches a filter off.

    Attributes:
        max_tokens: maximum number of new tokens, also limited by the context length.
        min_tokens: EOS is not sampled before this many; stop texts still apply.
        repetition_penalty: divides positive and multiplies negative logits of tokens
            among the last `repetition_context` (prompt included).
        presence_penalty, frequency_penalty: OpenAI's, over the same tokens.
        no_repeat_ngram: no sequence of this many tokens occurs twice in prompt and
            answer. EOS is exempt; where every token would be banned, none is.
        logit_bias: (token id, value added to its logit); -100 bans and 100 forces.
        stop: texts that end the answer; they are not part of it.
        stop_loops: ends an answer whose tail repeats one block of 1 to 64 tokens this
            many times and is at least 16 tokens long; 0 is off.
        logprobs: number of most likely tokens to report with each sampled one, with
            their log-probabilities; 0 is off.
        seed: None leaves MLX's random state unchanged.
    """

    max_tokens: int = option(
        256,
        "Maximum number of tokens to generate.",
        flags=("-m", "--max-tokens"),
        least=1,
        shown_default=MODELS,
    )
    min_tokens: int = option(
        0,
        "Minimum number of tokens to generate.",
        panel=SAMPLING,
        least=0,
        shown_default=MODELS,
    )
    temp: float = option(
        0.0,
        "Sampling temperature; 0 is greedy, without the penalties of the model's "
        "generation_config.json.",
        panel=SAMPLING,
        least=0,
        most=1e6,
        shown_default=MODELS,
    )
    top_p: float = option(
        1.0,
        "Sample from the most likely tokens of this total probability (nucleus "
        "sampling); 1 is off.",
        panel=SAMPLING,
        least=0,
        most=1,
        shown_default=MODELS,
    )
    top_k: int = option(
        0,
        "Sample from the N most likely tokens; 0 is off.",
        panel=SAMPLING,
        least=0,
        shown_default=MODELS,
    )
    min_p: float = option(
        0.0,
        "Drop tokens less likely than this fraction of the most likely one; 0 is off.",
        panel=SAMPLING,
        least=0,
        most=1,
        shown_default=MODELS,
    )
    repetition_penalty: float = option(
        1.0,
        "Penalty for tokens that occurred before: above 1 repeats less; 1 is off.",
        panel=SAMPLING,
        least=1e-6,
        most=1e6,
        shown_default=MODELS,
    )
    presence_penalty: float = option(
        0.0,
        "Subtracted from the logits of tokens that occurred before; 0 is off.",
        panel=SAMPLING,
        least=-2,
        most=2,
    )
    frequency_penalty: float = option(
        0.0,
        "Subtracted from the logit of a token for each time it occurred; 0 is off.",
        panel=SAMPLING,
        least=-2,
        most=2,
    )
    repetition_context: int = option(
        256,
        "Last tokens to which the penalties apply.",
        panel=SAMPLING,
        least=1,
    )
    no_repeat_ngram: int = option(
        0,
        "Never repeat a sequence of N tokens; 0 is off.",
        panel=SAMPLING,
        least=0,
        shown_default=MODELS,
    )
    logit_bias: tuple[tuple[int, float], ...] = option(
        (),
        "Value to add to the logit of a token, as ID=BIAS; repeatable.",
        panel=SAMPLING,
        read=_read_biases,
    )
    stop: tuple[str, ...] = option(
        (), "Text that ends the answer; repeatable.", panel=SAMPLING
    )
    stop_loops: int = option(
        0,
        "End the answer when it repeats itself N times in a row; 0 is off.",
        panel=SAMPLING,
        least=0,
    )
    logprobs: int = option(
        0,
        "Add the log-probability of each token and of the N most likely ones to "
        "--json; 0 is off.",
        panel=SAMPLING,
        least=0,
        most=20,
    )
    seed: int | None = option(
        None,
        "Seed of the random numbers.",
        panel=SAMPLING,
        least=0,
        most=2**64 - 1,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.stop_loops == 1:
            raise OpenELMError("`stop_loops` is 1; it must be 0 (off) or at least 2.")
        bias, stop = _as_tuples(self.logit_bias), _as_tuples(self.stop)
        stop = (stop,) if isinstance(stop, str) else stop
        object.__setattr__(self, "logit_bias", bias)
        object.__setattr__(self, "stop", stop)
        if not isinstance(bias, tuple) or not all(map(_is_bias, bias)):
            raise OpenELMError(
                f"`logit_bias` is {self.logit_bias!r}; it must be pairs of a token id "
                "and a number from -1e6 to 1e6."
            )
        if not isinstance(stop, tuple) or not all(
            isinstance(text, str) and text for text in stop
        ):
            raise OpenELMError(
                "`stop` is empty or not a string; pass a text that ends the answer."
            )
        for text in filter(find_unpaired_surrogate, stop):
            raise OpenELMError(
                f"`stop` is {text!a}, which is not UTF-8 text: it contains an unpaired "
                "surrogate."
            )

    @classmethod
    def from_defaults(
        cls, defaults: Mapping[str, Any], given: Mapping[str, Any] | None = None
    ) -> Self:
        """Merge the given options with a model's generation_config.json.

        Args:
            defaults: by Hugging Face's names: temperature, top_p, top_k, min_p,
                repetition_penalty, no_repeat_ngram_size, max_new_tokens and
                min_new_tokens; the first four only apply if do_sample is true.
            given: values by attribute name, which take precedence; None: not given. A
                given `temp` of 0 is plain greedy decoding: no penalty of `defaults`
                applies.
        """
        changes = {k: v for k, v in (given or {}).items() if v is not None}
        assert changes.keys() <= {f.name for f in fields(cls)}, changes
        sampled = defaults.get("do_sample") is True
        ignored: tuple[str, ...] = () if sampled else _ONLY_SAMPLED
        if changes.get("temp") == 0:
            ignored += _PENALTIES
        config: dict[str, Any] = {}
        for ours, theirs in _HUGGING_FACE.items():
            value = defaults.get(theirs)
            if value is not None and ours not in ignored:
                config[ours] = value
        if sampled:
            config.setdefault("temp", 1.0)
        try:
            base = cls(**config)
        except OpenELMError as error:
            raise OpenELMError(
                f"The model's generation_config.json: {error}"
            ) from error
        return replace(base, **changes)


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
_PENALTIES = ("repetition_penalty", "no_repeat_ngram")


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """Options of the KV cache."""

    kv_bits: int | None = option(
        None,
        "Quantize the KV cache to 4 or 8 bits: less memory, slower.",
        panel=SPEED_AND_MEMORY,
    )
    kv_group_size: int = option(
        64,
        "Group size of the quantized KV cache ({kv_bits}): 32, 64 or 128.",
        panel=SPEED_AND_MEMORY,
    )
    max_kv_size: int | None = option(
        None,
        "Size of a sliding KV cache: the first 4 and the newest tokens, N in all.",
        panel=SPEED_AND_MEMORY,
    )


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """Draft sources of speculative decoding; None: not used."""

    lookup: int | None = option(
        None,
        "Speculative decoding: draft up to N tokens from an earlier occurrence in the "
        "text.",
        panel=SPEED_AND_MEMORY,
    )
    draft_model: str | None = option(
        None,
        "Speculative decoding: draft tokens with this smaller model (demo, a folder or "
        "a Hub id).",
        panel=SPEED_AND_MEMORY,
    )


@dataclass(frozen=True, slots=True)
class ConstraintOptions:
    """Structured output; None: the text is free."""

    json_schema: str | None = option(
        None,
        "Generate JSON that is valid under the JSON schema in this file.",
        panel=STRUCTURED_OUTPUT,
    )
    regex: str | None = option(
        None,
        "Generate text that matches this regular expression as a whole.",
        panel=STRUCTURED_OUTPUT,
    )

    def __post_init__(self) -> None:
        if self.json_schema is not None and self.regex is not None:
            raise OpenELMError(
                "`json_schema` and `regex` cannot be used together; leave out one of "
                "them."
            )


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """Options of rendering a prompt."""

    template: str = option(
        "auto",
        "Prompt template: auto, raw, instruct, alpaca or openelm-peft.",
        panel=PROMPT,
    )
    system: str = option(
        "", "System text, where the template has a place for one.", panel=PROMPT
    )
