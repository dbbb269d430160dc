"""Files of prompts: JSON records or plain lines; invalid ones keep their problem."""

import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.options import Sampling
from mlx_openelm.input_files import parse_json
from mlx_openelm.message_parts import describe_error
from mlx_openelm.text.messages import check_messages, describe_text_problem
from mlx_openelm.text.record_files import (
    READ_ERRORS,
    Start,
    decompress,
    describe_line_problem,
    describe_type,
    is_record_file,
    open_records,
    read_lines,
    read_start,
    read_values,
    without_gz,
)
from mlx_openelm.text.templates import Turn

STDIN = "-"
ARRAY = "a JSON array"
OBJECTS = "JSON objects"
JSONL = "JSON lines"
LINES = "one prompt a line"
LINES_SUFFIXES = (".txt",)

_KEYS = ("prompt", "messages", "id")
_SAMPLING = {field.name: field.name for field in fields(Sampling)}
# Options of a record: names of OpenAI and Hugging Face for fields of Sampling
_OPTIONS = {
    **_SAMPLING,
    "temperature": "temp",
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "no_repeat_ngram_size": "no_repeat_ngram",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One record or line of a file.

    Attributes:
        number: of the line, or of the record where a record is not a line; from 1.
        place: its line, and its column where a record is not a line: "17" or "17:3".
        content: a text, or the turns of a conversation that ends with the user's.
        id: the record's "id", or None.
        problem: why it is not a prompt; empty for a valid one.
        options: fields of `Sampling` that the record sets for its own answer.
    """

    number: int
    place: str
    content: str | tuple[Turn, ...] = ""
    id: str | int | None = None
    problem: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a file called `name`, read as `format`."""

    name: str
    format: str
    prompts: tuple[Prompt, ...]


def read_prompts(path: str | Path) -> Prompts:
    """Read a file, or "-" for stdin: JSON lines, a JSON array, or one prompt a line.

    The suffix gives the format (.jsonl, .json, .ndjson; .txt; each also with .gz), but
    an array of objects or texts is always read as one. With another suffix it is JSON
    if it begins with "{" or with a line that is a JSON string.

    A record is a string, or an object with "prompt" (a string) or "messages" (objects
    with role and content, ending with a user's), and optionally "id" (a string or an
    integer) and options of `Sampling` for its answer. Blank lines are skipped. An
    invalid record gets a `problem`.

    Raises:
        OpenELMError: the file cannot be read, or holds no prompts.
    """
    from_stdin = str(path) == STDIN
    name = "stdin" if from_stdin else str(path)
    if from_stdin and sys.stdin is None:
        raise OpenELMError("stdin is closed; pass a file of prompts.")
    try:
        with _open_stdin() if from_stdin else open_records(Path(path)) as file:
            start = read_start(file)
            format = _find_format(name, start)
            read = _read_lines if format == LINES else _read_json
            prompts = tuple(read(file, start))
    except READ_ERRORS as error:
        raise OpenELMError(
            f"Cannot read the prompts of {name}: {describe_error(error)}."
        ) from error
    if not prompts:
        raise OpenELMError(f"{name} holds no prompts; it is empty.")
    return Prompts(name, format, prompts)


def _open_stdin() -> IO[bytes]:
    stdin: Any = sys.stdin.buffer
    return decompress(io.BufferedReader(stdin))  # which can look ahead


def _find_format(name: str, start: Start) -> str:
    if start.is_array and (is_record_file(name) or start.is_array_of_records):
        return ARRAY
    if without_gz(Path(name)).suffix.lower() in LINES_SUFFIXES:
        return LINES
    if start.is_open_object:
        return OBJECTS
    begins_object = start.data.lstrip().startswith(b"{")
    is_json = is_record_file(name) or begins_object or _is_string(start.data)
    return JSONL if is_json else LINES


def _is_string(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), str)
    except ValueError:
        return False


def _read_lines(file: IO[bytes], start: Start) -> Iterator[Prompt]:
    for number, read in read_lines(file, start):
        line = read.removesuffix(b"\n").removesuffix(b"\r")
        column, problem = describe_line_problem(line)
        problem = start.problem or problem
        if problem:
            yield Prompt(
                number, str(number), problem=_describe(number, column, problem)
            )
        else:
            yield Prompt(number, str(number), line.decode())
        if start.problem:
            return


def _read_json(file: IO[bytes], start: Start) -> Iterator[Prompt]:
    for number, read in enumerate(read_values(file, start=start), 1):
        if start.is_array or start.is_open_object:
            prompt = Prompt(number, read.place)
        else:
            prompt = Prompt(read.line, str(read.line))
        if read.problem:
            problem = _describe(read.line, read.column, read.problem)
            yield replace(prompt, problem=problem)
        else:
            yield _read_record(prompt, read.value)


def _describe(line: int, column: int | None, problem: str) -> str:
    return f"Line {line}{'' if column is None else f', column {column}'} {problem}."


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
        content, options = _read_object(value), _read_options(value)
        return replace(prompt, content=content, id=own, options=options)
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


def _read_options(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Sampling` in a record; no key is ignored."""
    names = [key for key in value if key not in _KEYS]
    unknown = [key for key in names if key not in _OPTIONS]
    if unknown:
        raise OpenELMError(
            f"The record has {', '.join(map(repr, unknown[:10]))}, which "
            f"{'is' if len(unknown) == 1 else 'are'} not used; remove it. Its keys are "
            f"{', '.join(_KEYS)}, and for its own answer {', '.join(_SAMPLING)}."
        )
    options: dict[str, Any] = {}
    for key in names:
        name, given = _OPTIONS[key], value[key]
        if name in options:
            raise OpenELMError(f"The record gives {name} twice, one of them as {key}.")
        if name == "logit_bias" and isinstance(given, dict):
            given = tuple((_read_token(i), bias) for i, bias in given.items())
        if given is not None:
            options[name] = given
    sampling = Sampling(**options)  # checks the values
    return {name: getattr(sampling, name) for name in options}


def _read_token(key: str) -> int | str:
    """Return a key as a token id; another text unchanged, which `Sampling` refuses."""
    return int(key) if key.isdecimal() and len(key) < 20 else key


def _read_messages(messages: Any) -> tuple[Turn, ...]:
    turns, problems = check_messages(messages, not_empty="user")
    if problems:
        raise OpenELMError(f"{'; '.join(problems)}.")
    if turns[-1].role != "user":
        raise OpenELMError(
            f"The last message is the {turns[-1].role}'s; it must be the user's."
        )
    return turns
