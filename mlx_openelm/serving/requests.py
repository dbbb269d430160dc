"""What a client asks of the server: JSON becomes a checked request, or a refusal.

The names are OpenAI's, and mlx-lm's where OpenAI has none (top_k, min_p,
repetition_penalty). What is not known is ignored, for clients send much that concerns
others; what is known and cannot be done here is refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NoReturn

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.options import Sampling
from mlx_openelm.text.templates import RAW, Turn, encode_turns
from mlx_openelm.text.tokenizer import EOS_TEXT, Tokenizer

MOST_BYTES = 16 * 2**20  # of a request: a million tokens, which get a better answer
MOST_STOPS = 16


class RequestError(Exception):
    """What a client did wrong.

    Attributes:
        status: of HTTP.
        code: OpenAI's word for it, or ours.
        param: the field that is wrong.
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str = "", param: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def as_json(self) -> dict[str, Any]:
        """Return it as OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        code, param = self.code or None, self.param or None
        told = {"message": str(self), "type": kind, "param": param, "code": code}
        return {"error": told}


@dataclass(frozen=True, slots=True)
class Served:
    """The one model that is served.

    Attributes:
        name: what clients call it.
        defaults: of what a request does not say.
        template: for chat completions, by name; never "auto".
        rows: of the embedding; token ids are below it.
        greedy_defaults: the defaults of a request with temperature 0, without the
            penalties of the model's generation_config.json; None: `defaults`.
    """

    name: str
    tokenizer: Tokenizer
    defaults: Sampling
    template: str
    context_length: int
    rows: int
    greedy_defaults: Sampling | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A request that can be answered.

    Attributes:
        prompt: its ids.
        sampling: `max_tokens` fits behind the prompt; `logprobs` counts alternatives.
        presence_penalty, frequency_penalty: mlx-lm's.
        chat: whether the prompt was turns.
        drops_space: the answer's first space belongs to the template.
        usage_in_stream: whether a stream ends in the counts.
        tells_logprobs: even where no alternatives are asked for.
    """

    prompt: list[int]
    sampling: Sampling
    presence_penalty: float
    frequency_penalty: float
    chat: bool
    drops_space: bool
    stream: bool
    usage_in_stream: bool
    tells_logprobs: bool


def read_json(data: bytes) -> dict[str, Any]:
    """Read a request's body.

    Raises:
        RequestError: it is not JSON object.
    """
    try:
        body = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"The request is not JSON: {error}.", code="no_json"
        ) from None
    if not isinstance(body, dict):
        raise RequestError("The request is not JSON object.", code="no_json")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def read_completion(
    body: Mapping[str, Any], served: Served, *, chat: bool
) -> Completion:
    """Check a request against the model that is served.

    Raises:
        RequestError: what cannot be done, and why.
    """
    _check_model(body, served)
    _refuse_unsupported(body)
    sampling = _read_sampling(body, served)
    sampling, tells_logprobs = _read_logprobs(body, sampling, chat=chat)
    if chat:
        prompt, drops_space = _read_messages(body, served)
        if served.template != RAW:  # an answer that spells it means it
            sampling = replace(sampling, stop=(*sampling.stop, EOS_TEXT))
    else:
        prompt, drops_space = _read_prompt(body, served), False
    room = served.context_length - len(prompt)
    if room < 1:
        raise RequestError(
            f"The prompt has {len(prompt)} tokens, and the model's context is "
            f"{served.context_length}; shorten it.",
            code="context_length_exceeded",
            param="messages" if chat else "prompt",
        )
    return Completion(
        prompt=prompt,
        sampling=replace(sampling, max_tokens=min(sampling.max_tokens, room)),
        presence_penalty=_read_penalty(body, "presence_penalty"),
        frequency_penalty=_read_penalty(body, "frequency_penalty"),
        chat=chat,
        drops_space=drops_space,
        stream=_read_flag(body, "stream"),
        usage_in_stream=_read_usage_wish(body),
        tells_logprobs=tells_logprobs,
    )


# What cannot be had --------------------------------------------------------------

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # field -> what may be said there
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "adapters": (),  # mlx-lm's server loads what a client names; this one never does
    "draft_model": ("default_model",),
    "role_mapping": (),
    "chat_template_kwargs": ({},),
    "xtc_probability": (0,),
}


def _check_model(body: Mapping[str, Any], served: Served) -> None:
    name = body.get("model")
    if name not in (None, "", "default_model", served.name):
        raise RequestError(
            f"No model is called {_shown(name)} here; this server has {served.name!r}.",
            status=404,
            code="model_not_found",
            param="model",
        )


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    for field, accepted in _UNSUPPORTED.items():
        value = body.get(field)
        if value is not None and value not in accepted:
            raise RequestError(
                f"{field} is {_shown(value)}, which this server cannot do; leave it "
                "out.",
                code="unsupported",
                param=field,
            )


# How the answer is drawn ---------------------------------------------------------

_SAMPLING = {  # their name -> Sampling's
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "min_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty",
    "repetition_context_size": "repetition_context",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "seed": "seed",
}


def _read_sampling(body: Mapping[str, Any], served: Served) -> Sampling:
    sampling = served.defaults
    if body.get("temperature") == 0:
        sampling = served.greedy_defaults or sampling
    for theirs, ours in _SAMPLING.items():
        value = body.get(theirs)
        if theirs == "repetition_penalty" and value == 0:
            value = 1.0  # mlx-lm's way to say "none"
        if value is not None:
            sampling = _replaced(sampling, theirs, ours, value)
    stop, bias = body.get("stop"), body.get("logit_bias")
    if stop:
        texts = [stop] if isinstance(stop, str) else stop
        if not isinstance(texts, list) or len(texts) > MOST_STOPS:
            raise _wrong("stop", f"must be a string, or a list of at most {MOST_STOPS}")
        if not all(isinstance(text, str) and text for text in texts):
            raise _wrong("stop", "must be texts, and not empty ones")
        sampling = _replaced(sampling, "stop", "stop", tuple(texts))
    if bias:
        sampling = _replaced(
            sampling, "logit_bias", "logit_bias", _read_bias(bias, served)
        )
    return sampling


def _replaced(sampling: Sampling, theirs: str, ours: str, value: Any) -> Sampling:
    try:
        return replace(sampling, **{ours: value})
    except OpenELMError as error:
        parameter = f"`{ours}`"
        message = str(error).replace(parameter, theirs, 1)
        if len(message) > 300:  # it holds what was sent
            message = f"{theirs} is not what it must be."
        raise RequestError(message, param=theirs) from None


def _read_bias(bias: Any, served: Served) -> tuple[tuple[int, Any], ...]:
    try:
        pairs = tuple((int(token), value) for token, value in bias.items())
    except (AttributeError, ValueError):
        raise _wrong("logit_bias", "must be an object of token ids") from None
    if not all(0 <= token < served.rows for token, _ in pairs):
        raise _wrong(
            "logit_bias", f"must name tokens of the model, 0 to {served.rows - 1}"
        )
    return pairs


def _read_penalty(body: Mapping[str, Any], field: str) -> float:
    value = body.get(field)
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(field, "must be a number")
    if not -2 <= value <= 2:
        raise _wrong(field, "must be between -2 and 2")
    return float(value)


def _read_logprobs(
    body: Mapping[str, Any], sampling: Sampling, *, chat: bool
) -> tuple[Sampling, bool]:
    """Read OpenAI's two ways to ask: a flag and a count, or a count alone."""
    wish, count = body.get("logprobs"), body.get("top_logprobs")
    if chat:
        wish = _read_flag(body, "logprobs")
        if count and not wish:
            raise _wrong("top_logprobs", "needs logprobs to be true")
    elif wish is not None and not isinstance(wish, bool):
        wish, count = True, wish
    if wish and count is not None:
        name = "top_logprobs" if chat else "logprobs"
        sampling = _replaced(sampling, name, "logprobs", count)
    return sampling, bool(wish)


def _read_usage_wish(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _wrong("stream_options", "must be an object")
    return _read_flag(options, "include_usage")


def _read_flag(body: Mapping[str, Any], field: str) -> bool:
    value = body.get(field)
    if value is not None and not isinstance(value, bool):
        raise _wrong(field, "must be true or false")
    return bool(value)


# What the answer follows ---------------------------------------------------------


def _read_prompt(body: Mapping[str, Any], served: Served) -> list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not _is_id(prompt[0]):
        prompt = prompt[0]
    if isinstance(prompt, str):
        _check_length(prompt, served, "prompt")
        try:
            return served.tokenizer.encode(prompt)
        except OpenELMError as error:
            raise RequestError(str(error), param="prompt") from None
    if not isinstance(prompt, list):
        raise _wrong("prompt", "must be a string, or a list of token ids")
    if not prompt or not all(map(_is_id, prompt)):
        raise _wrong(
            "prompt",
            "must be one text or one list of token ids: one request, one answer",
        )
    if not 0 <= min(prompt) <= max(prompt) < served.rows:
        raise _wrong("prompt", f"holds ids that are not in 0 to {served.rows - 1}")
    return prompt


def _check_length(text: str, served: Served, param: str) -> None:
    """Refuse what cannot fit before it is encoded, which takes time and memory."""
    if len(text) > served.context_length * _longest_piece(served.tokenizer):
        raise RequestError(
            f"The text has {len(text)} characters, and the model's context is "
            f"{served.context_length} tokens; shorten it.",
            code="context_length_exceeded",
            param=param,
        )


@cache
def _longest_piece(tokenizer: Tokenizer) -> int:
    return max(len(tokenizer.piece(i)) for i in range(tokenizer.vocab_size))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_messages(body: Mapping[str, Any], served: Served) -> tuple[list[int], bool]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "must be a list of at least one message")
    turns = [_read_turn(f"messages[{i}]", m) for i, m in enumerate(messages)]
    for turn in turns:
        _check_length(turn.text, served, "messages")
    system = turns.pop(0).text if turns[0].role == "system" else ""
    expected = (["user", "assistant"] * len(turns))[: len(turns)]
    if len(turns) % 2 == 0 or [turn.role for turn in turns] != expected:
        raise _wrong(
            "messages",
            "must be the user's and the assistant's in turn, the last one the user's, "
            "behind at most one of the system",
        )
    if system and served.template == RAW:
        raise _wrong(
            "messages", "cannot hold a system message: this model has no template"
        )
    try:
        return encode_turns(served.tokenizer, turns, served.template, system)
    except OpenELMError as error:
        raise RequestError(str(error), param="messages") from None


def _read_turn(place: str, message: Any) -> Turn:
    if not isinstance(message, dict):
        raise _wrong(place, "must be an object with a role and a content")
    role, content = message.get("role"), message.get("content")
    if role == "developer":
        role = "system"
    if role not in ("system", "user", "assistant"):
        raise _wrong(f"{place}.role", "must be system, user or assistant")
    if isinstance(content, list):
        content = _join_parts(content)
    if not isinstance(content, str):
        raise _wrong(f"{place}.content", "must be text; this model reads nothing else")
    return Turn(role, content)


def _join_parts(parts: Sequence[Any]) -> str | None:
    """Return the text of OpenAI's content parts; None if there are others."""
    texts = [
        part.get("text")
        for part in parts
        if isinstance(part, dict) and part.get("type") == "text"
    ]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        return None
    return "".join(map(str, texts))


def _wrong(field: str, expected: str) -> RequestError:
    return RequestError(f"{field} {expected}.", param=field)


def _shown(value: Any) -> str:
    if not isinstance(value, str | int | float):
        return "a list or an object"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
