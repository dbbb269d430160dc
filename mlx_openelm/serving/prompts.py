"""Prompts of requests as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.serving.api import MOST_CHOICES, ChatRequest
from mlx_openelm.serving.errors import RequestError
from mlx_openelm.serving.served import Served, ServedModel
from mlx_openelm.text.messages import check_messages
from mlx_openelm.text.templates import RAW, TEMPLATE_NAMES, encode_turns
from mlx_openelm.text.tokenizer import LONGEST_PIECE

_EXPECTED = "must be a text, a list of token ids, or a list of such"


@dataclass(frozen=True, slots=True)
class RequestPrompt:
    """A prompt.

    Attributes:
        text: the text it was made of; of ids, their text, if it is needed.
        drops_space: whether the first space of the answer belongs to the template.
    """

    ids: list[int]
    text: str = ""
    drops_space: bool = False


def read_prompts(
    prompt: Any, served: Served, *, has_text: bool = False
) -> list[RequestPrompt]:
    """Return the prompts of a completion: a text, ids, or a list of either.

    Args:
        has_text: also return the text of ids.

    Raises:
        RequestError: none of these, too many, or too long.
    """
    many = prompt if _is_list_of_prompts(prompt) else [prompt]
    if len(many) > MOST_CHOICES:
        raise _wrong("prompt", f"holds {len(many)} prompts; at most {MOST_CHOICES}")
    return [_read_prompt(one, served, has_text) for one in many]


def read_messages(
    request: ChatRequest, served: Served, model: ServedModel
) -> RequestPrompt:
    """Return the prompt of a chat: its messages, in any order, in the template.

    Raises:
        RequestError: a message is wrong, or the template cannot hold it.
    """
    template = _choose_template(request.template, model)
    turns, problems = check_messages(request.messages)
    if problems:
        raise RequestError(f"{problems[0][:300]}.", param="messages")
    if template == RAW and any(turn.role == "system" for turn in turns):
        raise _wrong(
            "messages",
            "has a system message, but the model has no prompt template; choose "
            "another `template`, or leave the message out",
        )
    check_length("".join(turn.text for turn in turns), served, "messages")
    try:
        ids, drops_space = encode_turns(served.tokenizer, turns, template)
    except OpenELMError as error:
        raise RequestError(str(error), param="messages") from None
    _check_count(ids, served, "messages")
    return RequestPrompt(ids, "", drops_space)


def check_length(text: str, served: Served, param: str) -> None:
    """Refuse a text that cannot fit before it is encoded, which takes time and memory.

    Raises:
        RequestError: it is too long.
    """
    if len(text) > served.context_length * LONGEST_PIECE:
        raise RequestError(
            f"The text has {len(text)} characters, and the model's context is "
            f"{served.context_length} tokens; shorten it.",
            code="context_length_exceeded",
            param=param,
        )


def _is_list_of_prompts(prompt: Any) -> bool:
    return isinstance(prompt, list) and len(prompt) > 0 and not _is_id(prompt[0])


def _read_prompt(prompt: Any, served: Served, has_text: bool) -> RequestPrompt:
    if isinstance(prompt, str):
        check_length(prompt, served, "prompt")
        try:
            ids = served.tokenizer.encode(prompt)
        except OpenELMError as error:
            raise RequestError(str(error), param="prompt") from None
        _check_count(ids, served, "prompt")
        return RequestPrompt(ids, prompt)
    if not isinstance(prompt, list) or not prompt:
        raise _wrong("prompt", _EXPECTED)
    _check_count(prompt, served, "prompt")
    if not all(map(_is_id, prompt)):
        raise _wrong("prompt", _EXPECTED)
    if not 0 <= min(prompt) <= max(prompt) < served.vocab_size:
        most = served.vocab_size - 1
        raise _wrong("prompt", f"holds ids that are not in 0 to {most}")
    if not has_text:
        return RequestPrompt(prompt)
    decoder = served.tokenizer.stream_decoder()
    text = "".join(map(decoder.add, prompt)) + decoder.finish()
    return RequestPrompt(prompt, text)


def _choose_template(name: str | None, model: ServedModel) -> str:
    if name in (None, "", "auto"):
        return model.template
    if name not in TEMPLATE_NAMES:
        raise _wrong("template", f"must be one of {', '.join(TEMPLATE_NAMES)}")
    return str(name)


def _check_count(ids: Sequence[Any], served: Served, param: str) -> None:
    if len(ids) >= served.context_length:
        raise RequestError(
            f"The prompt has {len(ids)} tokens, and the model's context is "
            f"{served.context_length}; shorten it.",
            code="context_length_exceeded",
            param=param,
        )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(field: str, expected: str) -> RequestError:
    return RequestError(f"{field} {expected}.", param=field)
