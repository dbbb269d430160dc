"""Formats of training records: text, prompt+completion, messages, Alpaca, preferences.

A format is detected from the fields of a record. Each record is checked and converted
to the turns of a conversation.
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
PREFERENCES = "preferences"  # prompt, chosen and rejected are texts
PREFERENCE_MESSAGES = "preferences in messages"


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """A format of records.

    Attributes:
        fields: fields that identify the format; all must be present and not null.
        read: checks a record and returns its turns.
        rejected: returns the rejected answer of a preference.
        applies: distinguishes formats with the same fields.
    """

    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any], "RecordChecks"], tuple[Turn, ...]]
    rejected: Callable[[Mapping[str, Any]], str | None] = lambda record: None
    applies: Callable[[Mapping[str, Any]], bool] = lambda record: True


@dataclass(frozen=True, slots=True)
class RecordFormats:
    """The record formats of an objective, by name.

    Attributes:
        advise: returns advice, given the fields of a record in an unknown format.
    """

    known: Mapping[str, RecordFormat]
    advise: Callable[[set[str]], str]

    def find(self, record: Mapping[str, Any]) -> str:
        """Return the name of the first format that matches the record, or ""."""
        for name, format in self.known.items():
            for key in format.fields:
                if record.get(key) is None:
                    break
            else:
                if format.applies(record):
                    return name
        return ""

    def describe_unknown(self, records: list[dict[str, Any]]) -> str:
        """Describe the error that no record of a file has a known format."""
        fields = set(records[0])
        nulls = {key for key, value in records[0].items() if value is None}
        named = [f"{key}{' (null)' if key in nulls else ''}" for key in sorted(fields)]
        listed = ", ".join(named[:10]) or "no fields"
        known = dict.fromkeys(format.fields for format in self.known.values())
        expected = "; or ".join(" and ".join(names) for names in known)
        count = f" (as all {len(records)} records)" if len(records) > 1 else ""
        return f"has {listed}{count}, but not {expected}: {self.advise(fields)}"


@dataclass(slots=True)
class RecordChecks:
    """Checks of one record; `problems` collects the errors."""

    problems: list[str] = field(default_factory=list)

    def text(self, value: Any, key: str, *, answer: bool = False) -> str:
        """Return `value` if it is a text that can be tokenized, else ""."""
        if not (isinstance(value, str) and value.isascii()):
            problem = describe_text_problem(value)
            if problem:
                self.problems.append(f"{key} {problem}")
            if not isinstance(value, str):
                return ""
        if answer and not value.strip():
            self.problems.append(f"{key} is empty: there is no answer to train on")
        if "\0" in value:
            self.problems.append(f"{key} contains a NUL character")
        return value

    def messages(self, value: Any, key: str) -> tuple[Turn, ...]:
        """Return a list of {role, content} as turns."""
        turns, problems = check_messages(value, key, not_empty="assistant")
        self.problems += problems
        for i, turn in enumerate(turns):
            if "\0" in turn.text:
                self.problems.append(f"{key}[{i}].content contains a NUL character")
        if not self.problems and all(turn.role != "assistant" for turn in turns):
            self.problems.append(f"{key} has no assistant turn to train on")
        return turns


def supervised_formats(
    prompt_key: str | None = None, completion_key: str | None = None
) -> RecordFormats:
    """Return the formats for supervised fine-tuning.

    Args:
        prompt_key, completion_key: fields of prompt and completion, if they have other
            names; prompt+completion is then the only format.
    """
    prompt, completion = prompt_key or "prompt", completion_key or "completion"

    def read_text(record: Mapping[str, Any], checks: RecordChecks) -> tuple[Turn, ...]:
        return (Turn("assistant", checks.text(record["text"], "text")),)

    def read_completion(
        record: Mapping[str, Any], checks: RecordChecks
    ) -> tuple[Turn, ...]:
        return (
            Turn("user", checks.text(record[prompt], prompt)),
            Turn("assistant", checks.text(record[completion], completion, answer=True)),
        )

    def read_alpaca(
        record: Mapping[str, Any], checks: RecordChecks
    ) -> tuple[Turn, ...]:
        context = record.get("input")
        context = "" if context is None else checks.text(context, "input")
        instruction = checks.text(record["instruction"], "instruction")
        return (
            Turn("user", instruction, input=context),
            Turn("assistant", checks.text(record["output"], "output", answer=True)),
        )

    def read_messages(
        record: Mapping[str, Any], checks: RecordChecks
    ) -> tuple[Turn, ...]:
        return checks.messages(record["messages"], "messages")

    def advise(fields: set[str]) -> str:
        if {"chosen", "rejected"} <= fields:
            return "for preferences use `objective` dpo or orpo"
        return "pass the names of other fields as `prompt_key` and `completion_key`"

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

    def read_texts(record: Mapping[str, Any], checks: RecordChecks) -> tuple[Turn, ...]:
        checks.text(record["rejected"], "rejected", answer=True)
        return (
            Turn("user", checks.text(record[prompt], prompt)),
            Turn("assistant", checks.text(record["chosen"], "chosen", answer=True)),
        )

    def read_messages(
        record: Mapping[str, Any], checks: RecordChecks
    ) -> tuple[Turn, ...]:
        answers = _read_preference_messages(record, checks)
        return (
            *_read_first_turns(record.get(prompt), prompt, answers, checks),
            *answers,
        )

    return RecordFormats(
        {
            PREFERENCES: RecordFormat(
                fields,
                read_texts,
                rejected=lambda record: str(record["rejected"]),
                applies=lambda record: not isinstance(record["chosen"], list),
            ),
            PREFERENCE_MESSAGES: RecordFormat(
                ("chosen", "rejected"),
                read_messages,
                applies=lambda record: isinstance(record["chosen"], list),
                rejected=lambda record: check_messages(record["rejected"])[0][-1].text,
            ),
        },
        lambda _: f"`objective` {objective} needs these fields",
    )


def _read_preference_messages(
    record: Mapping[str, Any], checks: RecordChecks
) -> tuple[Turn, ...]:
    chosen = checks.messages(record["chosen"], "chosen")
    rejected = checks.messages(record["rejected"], "rejected")
    if checks.problems:
        return ()
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1].role != "assistant":
            checks.problems.append(
                f"the last message of {key} is not an assistant turn"
            )
    if chosen[:-1] != rejected[:-1]:
        checks.problems.append("chosen and rejected differ before their last turn")
    return chosen


def _read_first_turns(
    value: Any, key: str, chosen: tuple[Turn, ...], checks: RecordChecks
) -> tuple[Turn, ...]:
    """Return the turns of a prompt that the messages of an answer do not repeat."""
    if isinstance(value, list):
        turns, problems = check_messages(value, key)
        checks.problems += problems
        return () if chosen[: len(turns)] == turns else turns
    if isinstance(value, str) and all(turn.role == "assistant" for turn in chosen):
        return (Turn("user", checks.text(value, key)),)
    return ()


# The template --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """The prompt template of the records, and the reason for its choice.

    Attributes:
        reason: empty if the option `template` names it.
    """

    name: str
    reason: str


def choose_template(
    requested: str | None, stored: str | None, format: str
) -> TemplateChoice:
    """Choose the prompt template for records of `format`.

    Args:
        requested: the option `template`; None or "auto" chooses automatically.
        stored: the template that is stored with the model, if any.

    Raises:
        OpenELMError: a template is requested for plain texts, which have no prompt.
    """
    if requested == "auto":
        requested = None
    if format == TEXT:
        if requested not in (None, "raw"):
            raise OpenELMError(
                f"`template` {requested} cannot be used for plain texts; leave it out, "
                "or use records with prompt and completion."
            )
        return TemplateChoice("raw", "plain texts have no prompt")
    if requested is not None:
        return TemplateChoice(requested, "")
    if stored is not None:
        return TemplateChoice(stored, "stored with the model")
    if format in (MESSAGES, PREFERENCE_MESSAGES):
        return TemplateChoice("instruct", "the records are conversations")
    if format == ALPACA:
        return TemplateChoice("alpaca", "the records are in Alpaca's format")
    return TemplateChoice("raw", "default")
