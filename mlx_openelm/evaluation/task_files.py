"""Local task files: multiple-choice questions.

A file is a JSON array of records or JSON lines, optionally with .gz. A record is one of

    {"instruction", "input", "output", "answer"}    as CommonSense-170k's test files
    {"context", "choices": [...], "answer"}         the unchanged context
    {"question", "choices": [...], "answer"}        "Question: ...<LF>Answer:"

In the first kind, "Answer format: a/b" at the end of the instruction lists the choices,
the answer is one of them, and the continuation "the correct answer is a" is scored with
OpenELM's PEFT template. In the others, the continuation is a space and the choice, as
in lm-evaluation-harness, and the answer is the choice's index, text or letter.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import find_unpaired_surrogate
from mlx_openelm.message_parts import describe_error
from mlx_openelm.text.record_files import (
    READ_ERRORS,
    describe_type,
    open_records,
    read_values,
    without_gz,
)
from mlx_openelm.text.templates import Turn, render

SEED = 83652  # of OpenELM's PEFT evaluation
ANSWER_FORMAT = "Answer format:"
PEFT_TEMPLATE = "openelm-peft"
_MOST_SHOWN = 5  # problems in an error message


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its choices.

    Attributes:
        line: the record's number in the file, from 1.
        context: the text before a choice, without the delimiter.
        choices: their lengths in characters count for acc_norm.
        answer: index of the right choice.
        delimiter: text between context and choice.
    """

    line: int
    context: str
    choices: tuple[str, ...]
    answer: int
    delimiter: str

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Context and continuation of each choice."""
        return [(self.context, self.delimiter + choice) for choice in self.choices]


@dataclass(frozen=True, slots=True)
class Task:
    """The questions of a file; `name` is that of the file, or of the suite's task."""

    name: str
    questions: tuple[Question, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the questions in their order, in hex."""
        fields = [
            [q.line, q.context, q.choices, q.answer, q.delimiter]
            for q in self.questions
        ]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def read_task(path: Path, *, limit: int | None = None, name: str = "") -> Task:
    """Read a file and check every record.

    The questions are shuffled with a fixed seed, so that the first ones are a sample.

    Args:
        limit: number of questions to keep after shuffling.
        name: of the task; default: the file name without suffixes.

    Raises:
        OpenELMError: the file cannot be read, or records are invalid; each problem has
            the number of its record.
    """
    if limit is not None and limit < 1:
        raise OpenELMError(f"`limit` is {limit}; it must be at least 1.")
    questions, problems = list[Question](), list[str]()
    for number, record in _read_records(path):
        try:
            questions.append(_read_question(number, record))
        except OpenELMError as problem:
            problems.append(f"record {number} {problem}")
    if problems:
        more = len(problems) - _MOST_SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        raise OpenELMError(f"{path}: {'; '.join(problems[:_MOST_SHOWN])}{rest}.")
    if not questions:
        raise OpenELMError(f"{path} holds no questions; it is empty.")
    random.Random(SEED).shuffle(questions)
    return Task(name or _name_of(path), tuple(questions[:limit]))


def read_tasks(paths: Sequence[Path], *, limit: int | None = None) -> list[Task]:
    """Read files with different names; see `read_task`.

    Raises:
        OpenELMError: two tasks have the same name, or a file is invalid.
    """
    for i, path in enumerate(paths):
        for other in paths[:i]:
            if _name_of(path) == _name_of(other):
                raise OpenELMError(
                    f"{other} and {path} have the same task name {_name_of(path)}; "
                    "rename one, or score them separately."
                )
    return [read_task(path, limit=limit) for path in paths]


def _name_of(path: Path) -> str:
    return without_gz(path).stem


def _read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each record."""
    try:
        with open_records(path) as file:
            for number, read in enumerate(read_values(file), 1):
                if read.problem:
                    raise OpenELMError(
                        f"{path}:{read.place} {read.problem}; a task is a JSON array "
                        "of questions, or one JSON object a line."
                    )
                yield number, read.value
    except READ_ERRORS as error:
        raise OpenELMError(
            f"Cannot read the task {path}: {describe_error(error)}."
        ) from error


# Records to questions ------------------------------------------------------------


def _read_question(number: int, record: Any) -> Question:
    """Read one record.

    Raises:
        OpenELMError: its problem, as the end of a sentence.
    """
    if not isinstance(record, dict):
        raise OpenELMError(f"is {describe_type(record)}, not an object")
    if "instruction" in record:
        return _read_instruction(number, record)
    if "choices" in record:
        return _read_choices(number, record)
    keys = ", ".join(map(repr, sorted(record)[:10])) or "no keys"
    raise OpenELMError(
        f"has {keys}; it needs instruction and answer, or context (or question), "
        "choices and answer"
    )


def _read_instruction(number: int, record: Mapping[str, Any]) -> Question:
    instruction = _get_text(record, "instruction")
    input = _get_text(record, "input") if record.get("input") else ""
    _, marker, listed = instruction.rpartition(ANSWER_FORMAT)
    if not marker:
        raise OpenELMError(f'has no "{ANSWER_FORMAT}" in its instruction')
    labels = [label.strip() for label in listed.split("/")]
    if "\n" in listed.strip():
        raise OpenELMError(f'has lines after its "{ANSWER_FORMAT}"')
    _check_choices(labels, f'"{ANSWER_FORMAT}"')
    answer = _get_text(record, "answer").strip()
    if answer not in labels:
        raise _not_a_choice(answer, labels)
    (exchange,) = render(
        [Turn("user", instruction, input), Turn("assistant", "")], PEFT_TEMPLATE
    )
    choices = tuple(f"the correct answer is {label}" for label in labels)
    return Question(number, exchange.context, choices, labels.index(answer), "")


def _read_choices(number: int, record: Mapping[str, Any]) -> Question:
    keys = [key for key in ("context", "question") if record.get(key) is not None]
    if len(keys) != 1:
        which = "both a context and a question" if keys else "no context (or question)"
        raise OpenELMError(f"has {which}; it needs one of them")
    text = _get_text(record, keys[0])
    context = text if keys == ["context"] else f"Question: {text}\nAnswer:"
    choices = record["choices"]
    if not isinstance(choices, list):
        raise OpenELMError(f"has choices that are {describe_type(choices)}, not a list")
    for i, choice in enumerate(choices):
        _check_text(choice, f"choices[{i}]")
    _check_choices(choices, "choices")
    answer = _find_answer(record.get("answer"), choices)
    return Question(number, context, tuple(choices), answer, " ")


def _find_answer(answer: Any, choices: list[str]) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise OpenELMError(
                f"has the answer {_shorten(answer)}; its choices are 0 to "
                f"{len(choices) - 1}"
            )
        return answer
    if not isinstance(answer, str):
        what = (
            "no answer"
            if answer is None
            else f"an answer that is {describe_type(answer)}"
        )
        raise OpenELMError(f"has {what}; it needs a choice's index, text or letter")
    if answer in choices:
        return choices.index(answer)
    letters = [chr(ord("A") + i) for i in range(min(len(choices), 26))]
    if answer.strip().upper() in letters:
        return letters.index(answer.strip().upper())
    raise _not_a_choice(answer, choices)


def _not_a_choice(answer: str, choices: list[str]) -> OpenELMError:
    listed = ", ".join(map(_shorten, choices[:6]))
    return OpenELMError(
        f"has the answer {_shorten(answer)}, which is not one of its choices: {listed}"
    )


def _check_choices(choices: list[str], what: str) -> None:
    if len(choices) < 2:
        count = "one choice" if choices else "no choices"
        raise OpenELMError(f"has {count} in its {what}; there must be two or more")
    if not all(choice.strip() for choice in choices):
        raise OpenELMError(f"has an empty choice in its {what}")
    doubled = next((c for i, c in enumerate(choices) if c in choices[:i]), None)
    if doubled is not None:
        raise OpenELMError(f"has the choice {_shorten(doubled)} twice in its {what}")


def _get_text(record: Mapping[str, Any], key: str) -> str:
    if record.get(key) is None:
        raise OpenELMError(f"has no {key}")
    return _check_text(record[key], key, empty=key == "input")


def _check_text(value: Any, what: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise OpenELMError(f"has {describe_type(value)} as {what}, not a string")
    if not (value.strip() or empty):
        raise OpenELMError(f"has an empty {what}")
    surrogate = find_unpaired_surrogate(value)
    if surrogate:
        raise OpenELMError(f"has the unpaired surrogate {surrogate} in {what}")
    return value


def _shorten(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:  # an integer with too many digits for repr
        return "a huge number"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
