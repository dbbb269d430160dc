"""Formats of training records: text, prompt+completion, messages, Alpaca, preferences.

A format is recognised by the fields of its records; each record is checked and read as
the turns of a conversation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.messages import check_messages, describe_text_problem
from mlx_openelm.text.templates import Turn

TEXT = "text"
COMPLETION = "prompt+completion"
MESSAGES = "messages"
ALPACA = "alpaca"
PREFERENCES = "preferences"  # prompt, chosen and rejected as texts
PREFERENCE_MESSAGES = "preferences in messages"


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """A format of records.

    Attributes:
        fields: identify it: all of them are there and not null.
        read: returns a record as turns, checked.
        rejected: returns the answer of a preference that is worse than the last turn.
        applies: tells formats with the same fields apart.
    """

    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any], "RecordChecks"], tuple[Turn, ...]]
    rejected: Callable[[Mapping[str, Any]], str | None] = lambda found: None
    applies: Callable[[Mapping[str, Any]], bool] = lambda found: True


@dataclass(frozen=True, slots=True)
class RecordFormats:
    """The formats that an objective reads, by name.

    Attributes:
        advise: returns what to do, given the fields of a record of none of them.
    """

    known: Mapping[str, RecordFormat]
    advise: Callable[[set[str]], str]

    def find(self, record: Mapping[str, Any]) -> str:
        """Return the name of the first format that the record has, or ""."""
        for name, known in self.known.items():
            there = all(record.get(key) is not None for key in known.fields)
            if there and known.applies(record):
                return name
        return ""

    def describe_unknown(self, found: list[tuple[str, dict[str, Any]]]) -> str:
        """Describe the error that no record of a file has any of the formats."""
        there = set(found[0][1])
        has = ", ".join(sorted(map(str, there))[:10]) or "no fields"
        fields = dict.fromkeys(known.fields for known in self.known.values())
        wanted = "; or ".join(" and ".join(names) for names in fields)
        others = f", nor has any of the {len(found)} records" if len(found) > 1 else ""
        return f"has {has}, and not {wanted}{others}: {self.advise(there)}"


@dataclass(slots=True)
class RecordChecks:
    """Checks of one record; `problems` collects the errors."""

    problems: list[str] = field(default_factory=list)

    def text(self, value: Any, key: str, *, answer: bool = False) -> str:
        """Return `value` if it is text that can be tokenized, else ""."""
        problem = describe_text_problem(value)
        if problem:
            self.problems.append(f"{key} {problem}")
        if not isinstance(value, str):
            return ""
        if answer and not value.strip():
            self.problems.append(f"{key} is empty: there is no answer to learn")
        self._refuse_nul(value, key)
        return value

    def messages(self, value: Any, key: str) -> tuple[Turn, ...]:
        """Return a list of {role, content} as turns."""
        turns, problems = check_messages(value, key, not_empty="assistant")
        self.problems += problems
        for i, turn in enumerate(turns):
            self._refuse_nul(turn.text, f"{key}[{i}].content")
        if not self.problems and all(turn.role != "assistant" for turn in turns):
            self.problems.append(f"{key} has no assistant's turn: nothing to learn")
        return turns

    def _refuse_nul(self, text: str, key: str) -> None:
        if "\0" in text:
            self.problems.append(f"{key} holds a NUL character")


def supervised_formats(
    prompt_key: str | None = None, completion_key: str | None = None
) -> RecordFormats:
    """Return the formats of examples to imitate.

    Args:
        prompt_key, completion_key: other names of the fields of prompt+completion,
            which is then the only format.
    """
    prompt, completion = prompt_key or "prompt", completion_key or "completion"

    def read_text(found: Mapping[str, Any], checks: RecordChecks) -> tuple[Turn, ...]:
        return (Turn("assistant", checks.text(found["text"], "text")),)

    def read_completion(
        found: Mapping[str, Any], checks: RecordChecks
    ) -> tuple[Turn, ...]:
        return (
            Turn("user", checks.text(found[prompt], prompt)),
            Turn("assistant", checks.text(found[completion], completion, answer=True)),
        )

    def read_alpaca(found: Mapping[str, Any], checks: RecordChecks) -> tuple[Turn, ...]:
        given = found.get("input")
        given = "" if given is None else checks.text(given, "input")
        instruction = checks.text(found["instruction"], "instruction")
        return (
            Turn("user", instruction, input=given),
            Turn("assistant", checks.text(found["output"], "output", answer=True)),
        )

    def read_messages(
        found: Mapping[str, Any], checks: RecordChecks
    ) -> tuple[Turn, ...]:
        return checks.messages(found["messages"], "messages")

    def advise(fields: set[str]) -> str:
        if {"chosen", "rejected"} <= fields:
            return "for preferences say `objective` dpo"
        return "name other fields by `prompt_key` and `completion_key`"

    completions = {COMPLETION: RecordFormat((prompt, completion), read_completion)}
    if prompt_key or completion_key:
        return RecordFormats(completions, advise)
    return RecordFormats(
        {
            MESSAGES: RecordFormat(("messages",), read_messages),
            ALPACA: RecordFormat(("instruction", "output"), read_alpaca),
            **completions,
            TEXT: RecordFormat(("text",), read_text),
        },
        advise,
    )


def preference_formats(objective: str, prompt_key: str | None) -> RecordFormats:
    """Return the formats of a prompt with a chosen and a rejected answer."""
    prompt = prompt_key or "prompt"
    fields = (prompt, "chosen", "rejected")

    def read_texts(found: Mapping[str, Any], checks: RecordChecks) -> tuple[Turn, ...]:
        checks.text(found["rejected"], "rejected", answer=True)
        return (
            Turn("user", checks.text(found[prompt], prompt)),
            Turn("assistant", checks.text(found["chosen"], "chosen", answer=True)),
        )

    return RecordFormats(
        {
            PREFERENCES: RecordFormat(
                fields,
                read_texts,
                rejected=lambda found: str(found["rejected"]),
                applies=lambda found: not isinstance(found["chosen"], list),
            ),
            PREFERENCE_MESSAGES: RecordFormat(
                fields,
                _read_preference_messages,
                rejected=lambda found: str(found["rejected"][-1]["content"]),
            ),
        },
        lambda _: f"these are what `objective` {objective} needs",
    )


def _read_preference_messages(
    found: Mapping[str, Any], checks: RecordChecks
) -> tuple[Turn, ...]:
    chosen = checks.messages(found["chosen"], "chosen")
    rejected = checks.messages(found["rejected"], "rejected")
    if checks.problems:
        return ()
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1].role != "assistant":
            checks.problems.append(f"the last of {key} is no assistant's turn")
    if chosen[:-1] != rejected[:-1]:
        checks.problems.append("chosen and rejected differ before their last turn")
    return chosen


# The template --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """The template that renders the records, and why it is that."""

    name: str
    reason: str


def choose_template(
    said: str | None, stored: str | None, format: str
) -> TemplateChoice:
    """Choose what renders records of `format`.

    Args:
        said: what a person asked for; None or "auto": nothing.
        stored: what is stored with the model, if anything.

    Raises:
        OpenELMError: a template is said for plain texts, which have no prompt.
    """
    if said == "auto":
        said = None
    if format == TEXT:
        if said not in (None, "raw"):
            raise OpenELMError(
                f"`template` {said} has no place for plain texts; leave it out, or "
                "give records with prompt and completion."
            )
        return TemplateChoice("raw", "plain texts are trained on as they are")
    if said is not None:
        return TemplateChoice(said, "it was asked for")
    if stored is not None:
        return TemplateChoice(stored, "it is stored with the model")
    if format in (MESSAGES, PREFERENCE_MESSAGES):
        return TemplateChoice("instruct", "the records are conversations")
    if format == ALPACA:
        return TemplateChoice("alpaca", "the records are Alpaca's")
    return TemplateChoice("raw", "neither the model nor the records ask for another")
