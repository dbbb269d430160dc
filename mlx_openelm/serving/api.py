"""The requests of the API as pydantic models, with all their limits.

The names are OpenAI's, and mlx-lm's where OpenAI has none (top_k, min_p,
repetition_penalty). Unknown fields are ignored, as OpenAI ignores them; fields that
cannot be fulfilled are refused.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from mlx_openelm.serving.errors import RequestError

MOST_BYTES = 8 * 2**20  # of a body
MOST_BYTES_TOGETHER = 64 * 2**20  # of all bodies that are being read
MOST_STOPS = 16
MOST_BIASES = 1024
MOST_CHOICES = 128  # prompts times n
MOST_MESSAGES = 4096
MOST_GRAMMAR_CHARACTERS = 2**18
MOST_NGRAM = 64  # its blocks are compared at each token
_LONGEST_SHOWN = 60

_INT64 = 2**63 - 1
Count = Annotated[int, Field(ge=0, le=_INT64)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Biases = Annotated[
    dict[str, float],
    Field(json_schema_extra={"maxProperties": MOST_BIASES}),
]
Text = Annotated[str, Field(min_length=1)]
# Checked by `prompts.read_prompts`, which names the place of what is wrong.
Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer"}},
                },
            ]
        }
    ),
]


# Checked by `prompts.read_messages`, as the records of `lora` are.
Message = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "role": {"enum": ["system", "developer", "user", "assistant"]},
                "content": {
                    "anyOf": [
                        {"type": "string"},
                        {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "properties": {
                                    "type": {"const": "text"},
                                    "text": {"type": "string"},
                                },
                                "required": ["type", "text"],
                            },
                        },
                    ]
                },
            },
            "required": ["role", "content"],
        }
    ),
]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class JsonSchema(_Strict):
    name: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """The grammar that an answer must follow."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    regex: str | None = Field(None, max_length=MOST_GRAMMAR_CHARACTERS)
    grammar: str | None = Field(None, max_length=MOST_GRAMMAR_CHARACTERS)

    @model_validator(mode="after")
    def _has_its_text(self) -> "ResponseFormat":
        has_text = self.type in ("json_schema", "regex", "grammar")
        if has_text and getattr(self, self.type) is None:
            raise PydanticCustomError(
                "grammar",
                "it needs the field {kind} in addition to type",
                {"kind": self.type},
            )
        return self


class StreamOptions(_Strict):
    include_usage: bool | None = None


class GenerationRequest(_Strict):
    """The fields that completions and chats share; null is the default of each.

    -1 stands for "no limit" (max_tokens, repetition_context_size), "off" (top_k) and
    "random" (seed).
    """

    model: str | None = None
    max_tokens: int | None = Field(None, ge=-1, le=_INT64)
    max_completion_tokens: int | None = Field(None, ge=-1, le=_INT64)
    min_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=1e6)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0, le=1e6)
    repetition_context_size: int | None = Field(None, ge=-1)
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=MOST_NGRAM)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    seed: int | None = Field(None, ge=-1, le=2**64 - 1)
    stop: (
        str | Annotated[list[Text], Field(max_length=MOST_STOPS, fail_fast=True)] | None
    ) = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    regex: str | None = Field(None, max_length=MOST_GRAMMAR_CHARACTERS)
    grammar: str | None = Field(None, max_length=MOST_GRAMMAR_CHARACTERS)
    # Fields that some clients always send, with the only values that are possible here.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    adapters: None = None
    draft_model: Literal["default_model"] | None = None
    role_mapping: None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    xtc_probability: Annotated[float, Field(ge=0, le=0)] | None = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        # Before the values are checked: an error for each of many takes seconds.
        if isinstance(value, dict) and len(value) > MOST_BIASES:
            raise PydanticCustomError(
                "bias",
                "it has {count} entries; at most {most} are possible",
                {"count": len(value), "most": MOST_BIASES},
            )
        return value

    @field_validator("logit_bias")
    @classmethod
    def _bounded(cls, value: Mapping[str, float] | None) -> Mapping[str, float] | None:
        for token, bias in (value or {}).items():
            if not (token.isascii() and token.isdecimal() and len(token) <= 10):
                raise PydanticCustomError("token", "its keys must be token ids")
            if abs(bias) > 1e6:
                raise PydanticCustomError("bias", "its values must be -1e6 to 1e6")
        return value

    @property
    def most_tokens(self) -> int | None:
        """The tokens of an answer: -1 is any number; None: it is not given."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    @property
    def stops(self) -> tuple[str, ...]:
        if isinstance(self.stop, str):
            return (self.stop,) if self.stop else ()
        return tuple(self.stop or ())

    @property
    def has_grammar(self) -> bool:
        form = self.response_format
        constrained = form is not None and form.type != "text"
        return constrained or self.regex is not None or self.grammar is not None

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: bool | Annotated[int, Field(ge=0, le=20)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    ]
    template: str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _logprobs_for_top_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError(
                "logprobs", "top_logprobs needs logprobs to be true"
            )
        return self


_Request = TypeVar("_Request", bound=BaseModel)


def read_request(kind: type[_Request], data: bytes) -> _Request:
    """Parse and check the body of a request.

    Raises:
        RequestError: it is not JSON, or a field is wrong.
    """
    try:
        body = from_json(data, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"The body is not JSON: {str(error)[:200]}.", code="no_json"
        ) from None
    if not isinstance(body, dict):
        raise RequestError("The body is not a JSON object.", code="no_json")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _named(error) from None


def show(value: Any) -> str:
    """Return a value of a request for an error message."""
    if not isinstance(value, str | int | float | None):
        return "a list or an object"
    text = repr(value)
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[:_LONGEST_SHOWN]}..."
    return text


def _named(error: ValidationError) -> RequestError:
    """Return the error of the first wrong field."""
    first, *others = error.errors(include_url=False)
    for other in others:  # of a union: a list is an error of the branch for lists
        if other["loc"][0] == first["loc"][0] and isinstance(first["input"], list):
            first = other
    place = [str(part) for part in first["loc"] if _is_field(part)]
    field = ".".join(place)
    reason = first["msg"].removeprefix("Input should be ")
    if first["type"] == "missing":
        message = f"The field {field} is missing"
    elif not field:
        message = reason
    elif first["type"] in ("token", "bias", "too_long", "logprobs", "grammar"):
        message = f"{field}: {reason}"
    else:
        message = f"{field} is {show(first['input'])}; it must be {reason}"
    return RequestError(f"{message[:380]}.", param=place[0] if place else "")


def _is_field(part: int | str) -> bool:
    """Whether a part of a location is of the request, not of a union's branch."""
    return isinstance(part, int) or (part.isidentifier() and part not in _BRANCHES)


_BRANCHES = {"str", "bool", "int", "constrained"}
