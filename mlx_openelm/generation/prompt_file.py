"""A file of prompts is read, whatever is wrong with some of its lines."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.templates import Turn

STDIN = "-"
JSONL = "JSON lines"
LINES = "one prompt a line"
JSONL_SUFFIXES = (".jsonl", ".ndjson")
LINES_SUFFIXES = (".txt",)
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What stands in one line.

    Attributes:
        line: its number, from 1.
        said: a text, or the turns of a conversation, whose last one is the user's.
        id: what the line calls itself, or None.
        problem: why it is no prompt; empty where it is one.
    """

    line: int
    said: str | tuple[Turn, ...] = ""
    id: str | int | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a file called `name`, read as `format`."""

    name: str
    format: str
    prompts: tuple[Prompt, ...]


def read_prompts(path: str | Path) -> Prompts:
    """Read a file, or "-" for stdin: JSON lines, or one prompt a line.

    The name decides (.jsonl, .ndjson; .txt); where it does not, it is JSON lines if the
    first line that is not blank begins with "{" or is a JSON string. In JSON lines each
    is a string, or an object with "prompt" (a text) or "messages" (a list of role and
    content, the last one a user's), and perhaps an "id" (a text or a whole number).
    Blank lines are skipped. What is wrong with a line is kept as its `problem`.

    Raises:
        OpenELMError: the file cannot be read, or holds nothing but blank lines.
    """
    from_stdin = str(path) == STDIN
    name = "stdin" if from_stdin else str(path)
    if from_stdin and sys.stdin is None:
        raise OpenELMError("stdin is closed; say a file of prompts.")
    try:
        data = sys.stdin.buffer.read() if from_stdin else Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise OpenELMError(f"Cannot read the prompts of {name}: {error}.") from error
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    filled = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise OpenELMError(f"{name} holds no prompts; it is empty.")
    format = _find_format(name, filled[0][1])
    read = _read_json if format == JSONL else _read_line
    prompts = tuple(read(n, line.removesuffix(b"\r")) for n, line in filled)
    return Prompts(name, format, prompts)


def _find_format(name: str, first: bytes) -> str:
    suffix = Path(name).suffix.lower()
    if suffix in LINES_SUFFIXES:
        return LINES
    if suffix in JSONL_SUFFIXES or first.lstrip().startswith(b"{"):
        return JSONL
    try:
        return JSONL if isinstance(json.loads(first), str) else LINES
    except (ValueError, RecursionError):
        return LINES


def _read_line(number: int, line: bytes) -> Prompt:
    try:
        return Prompt(number, line.decode())
    except UnicodeDecodeError as error:
        return Prompt(number, problem=_describe_bytes(line, error))


def _read_json(number: int, line: bytes) -> Prompt:
    own = None
    try:
        value = json.loads(line.decode())
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, dict):
            raise OpenELMError(
                f"This line is {_kind(value)}; it must be an object or a text."
            )
        own = _check_id(value.get("id"))
        return Prompt(number, _read_object(value), own)
    except UnicodeDecodeError as error:
        problem = _describe_bytes(line, error)
    except json.JSONDecodeError as error:
        problem = f"This line is no JSON ({error.msg}, column {error.colno})."
    except (ValueError, RecursionError) as error:  # an endless number, or nesting
        problem = f"This line cannot be read as JSON ({error})."
    except OpenELMError as error:
        problem = str(error)
    return Prompt(number, id=own, problem=problem)


def _check_id(value: Any) -> str | int | None:
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise OpenELMError(
            f"The id is {_kind(value)}; it must be a text or a whole number."
        )
    if isinstance(value, str):
        _check_unicode(value, "The id")
    return value


def _read_object(value: Mapping[str, Any]) -> str | tuple[Turn, ...]:
    text, messages = value.get("prompt"), value.get("messages")
    if text is not None and messages is not None:
        raise OpenELMError("There are a prompt and messages; give one of them.")
    if messages is not None:
        return _read_messages(messages)
    if text is None:
        has = ", ".join(map(repr, sorted(value)[:10])) or "nothing"
        raise OpenELMError(f"There is no prompt and no messages, but {has}.")
    return _check_text(text, "The prompt")


def _read_messages(messages: Any) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else _kind(messages)
        raise OpenELMError(f"messages is {what}; it must be a list of messages.")
    turns = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise OpenELMError(
                f"messages[{i}] is {_kind(message)}; it must be an object."
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise OpenELMError(
                f"messages[{i}].role is {role!r}; it must be system, user or assistant."
            )
        if role == "system" and i:
            raise OpenELMError(
                f"messages[{i}] is a system message; it must be the first one."
            )
        may_be_empty = role != "user"
        what = f"messages[{i}].content"
        turns.append(Turn(role, _check_text(content, what, empty=may_be_empty)))
    if turns[-1].role != "user":
        raise OpenELMError(
            f"The last message is the {turns[-1].role}'s; it must be the user's."
        )
    return tuple(turns)


def _check_text(value: Any, what: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise OpenELMError(f"{what} is {_kind(value)}; it must be a text.")
    if not (value.strip() or empty):
        raise OpenELMError(f"{what} is empty.")
    return _check_unicode(value, what)


def _check_unicode(value: str, what: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])[1:-1]
        raise OpenELMError(f"{what} holds {half}, half of a character.") from error
    return value


def _describe_bytes(line: bytes, error: UnicodeDecodeError) -> str:
    at = f"the byte 0x{line[error.start]:02x}, number {error.start + 1}"
    return f"This line is no UTF-8 ({at}); save it as UTF-8."


def _kind(value: Any) -> str:
    names = {str: "a text", bool: "true or false", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), "a number")
