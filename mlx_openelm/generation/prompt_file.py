"""Files of prompts: JSON records or plain lines; invalid ones keep their problem."""

import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import describe_error
from mlx_openelm.text.messages import check_messages, describe_text_problem
from mlx_openelm.text.record_files import (
    JSON_SUFFIXES,
    READ_ERRORS,
    describe_type,
    is_array,
    open_records,
    read_values,
    without_gz,
)
from mlx_openelm.text.templates import Turn

STDIN = "-"
ARRAY = "a JSON array"
JSONL = "JSON lines"
LINES = "one prompt a line"
LINES_SUFFIXES = (".txt",)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One record or line of a file.

    Attributes:
        number: of the line, or of the element of an array; from 1.
        place: its line, in an array with the column: "17" or "17:3".
        content: a text, or the turns of a conversation that ends with the user's.
        id: the record's "id", or None.
        problem: why it is not a prompt; empty for a valid one.
    """

    number: int
    place: str
    content: str | tuple[Turn, ...] = ""
    id: str | int | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a file called `name`, read as `format`."""

    name: str
    format: str
    prompts: tuple[Prompt, ...]


def read_prompts(path: str | Path) -> Prompts:
    """Read a file, or "-" for stdin: JSON lines, a JSON array, or one prompt a line.

    The suffix gives the format (.jsonl, .json, .ndjson; .txt; each also with .gz). With
    another suffix it is JSON if it begins with "{", with an array of objects or texts,
    or with a line that is a JSON string. A record is a string, or an object with
    "prompt" (a string) or "messages" (objects with role and content, ending with a
    user's), and optionally "id" (a string or an integer). Blank lines are skipped. An
    invalid record gets a `problem`.

    Raises:
        OpenELMError: the file cannot be read, or holds no prompts.
    """
    from_stdin = str(path) == STDIN
    name = "stdin" if from_stdin else str(path)
    if from_stdin and sys.stdin is None:
        raise OpenELMError("stdin is closed; pass a file of prompts.")
    try:
        data = sys.stdin.buffer.read() if from_stdin else _read_bytes(Path(path))
    except READ_ERRORS as error:
        raise OpenELMError(
            f"Cannot read the prompts of {name}: {describe_error(error)}."
        ) from error
    format = _find_format(name, data)
    read = _read_lines(data) if format == LINES else _read_json(data, format)
    prompts = tuple(read)
    if not prompts:
        raise OpenELMError(f"{name} holds no prompts; it is empty.")
    return Prompts(name, format, prompts)


def _read_bytes(path: Path) -> bytes:
    with open_records(path) as file:
        return file.read()


def _find_format(name: str, data: bytes) -> str:
    suffix = without_gz(Path(name)).suffix.lower()
    if suffix in LINES_SUFFIXES:
        return LINES
    if is_array(data):
        return ARRAY
    first = next(read_values(io.BytesIO(data)), None)
    begins_object = data.removeprefix(_BOM).lstrip().startswith(b"{")
    is_text = first is not None and isinstance(first.value, str)
    return JSONL if suffix in JSON_SUFFIXES or begins_object or is_text else LINES


_BOM = b"\xef\xbb\xbf"


def _read_lines(data: bytes) -> Iterator[Prompt]:
    for number, line in enumerate(data.removeprefix(_BOM).split(b"\n"), 1):
        if line.strip():
            yield _read_line(number, line.removesuffix(b"\r"))


def _read_line(number: int, line: bytes) -> Prompt:
    try:
        return Prompt(number, str(number), line.decode())
    except UnicodeDecodeError as error:
        at = f"the byte 0x{line[error.start]:02x}, number {error.start + 1}"
        problem = f"This line is not valid UTF-8 ({at}); save the file as UTF-8."
        return Prompt(number, str(number), problem=problem)


def _read_json(data: bytes, format: str) -> Iterator[Prompt]:
    for number, read in enumerate(read_values(io.BytesIO(data)), 1):
        if format == ARRAY:
            prompt = Prompt(number, read.place)
        else:
            prompt = Prompt(read.line, str(read.line))
        if read.problem:
            column = "" if read.column is None else f", column {read.column}"
            problem = f"Line {read.line}{column} {read.problem}."
            yield replace(prompt, problem=problem)
        else:
            yield _read_record(prompt, read.value)


def _read_record(prompt: Prompt, value: Any) -> Prompt:
    """Return the prompt with the content or the problem of its record."""
    own = None
    try:
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, dict):
            raise OpenELMError(
                f"The record is {describe_type(value)}; it must be an object or string."
            )
        own = _check_id(value.get("id"))
        return replace(prompt, content=_read_object(value), id=own)
    except OpenELMError as error:
        return replace(prompt, id=own, problem=str(error))


def _check_id(value: Any) -> str | int | None:
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise OpenELMError(
            f"The id is {describe_type(value)}; it must be a string or an integer."
        )
    problem = describe_text_problem(value) if isinstance(value, str) else ""
    if problem:
        raise OpenELMError(f"The id {problem}.")
    return value


def _read_object(value: Mapping[str, Any]) -> str | tuple[Turn, ...]:
    text, messages = value.get("prompt"), value.get("messages")
    if text is not None and messages is not None:
        raise OpenELMError('The record has "prompt" and "messages"; give one of them.')
    if messages is not None:
        return _read_messages(messages)
    if text is None:
        keys = ", ".join(map(repr, sorted(value)[:10])) or "no keys"
        raise OpenELMError(f'The record needs "prompt" or "messages"; it has {keys}.')
    problem = describe_text_problem(text) or ("" if text.strip() else "is empty")
    if problem:
        raise OpenELMError(f"The prompt {problem}.")
    return str(text)


def _read_messages(messages: Any) -> tuple[Turn, ...]:
    turns, problems = check_messages(messages, not_empty="user")
    if problems:
        raise OpenELMError(f"{'; '.join(problems)}.")
    if turns[-1].role != "user":
        raise OpenELMError(
            f"The last message is the {turns[-1].role}'s; it must be the user's."
        )
    return turns
