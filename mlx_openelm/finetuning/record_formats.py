"""Formats of training records: text, prompt+completion, messages, Alpaca, preferences.

A format is recognised by the fields of its records; each record is checked and read as
the turns of a conversation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """A format of records: the fields that identify it, and its reader."""

    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any], "RecordChecks"], tuple[Turn, ...]]


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


def known_formats(
    objective: str, prompt_key: str | None, completion_key: str | None
) -> dict[str, RecordFormat]:
    """Return the formats by name; the first one whose fields are present applies."""
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

    if objective == "dpo":
        fields = (prompt, "chosen", "rejected")
        return {
            PREFERENCES: RecordFormat(
                fields, lambda found, checks: _read_preference(found, checks, prompt)
            ),
            PREFERENCE_MESSAGES: RecordFormat(fields, _read_preference_messages),
        }
    completions = {COMPLETION: RecordFormat((prompt, completion), read_completion)}
    if prompt_key or completion_key:
        return completions
    return {
        MESSAGES: RecordFormat(("messages",), read_messages),
        ALPACA: RecordFormat(("instruction", "output"), read_alpaca),
        **completions,
        TEXT: RecordFormat(("text",), read_text),
    }


def _read_preference(
    found: Mapping[str, Any], checks: RecordChecks, prompt: str
) -> tuple[Turn, ...]:
    checks.text(found["rejected"], "rejected", answer=True)
    return (
        Turn("user", checks.text(found[prompt], prompt)),
        Turn("assistant", checks.text(found["chosen"], "chosen", answer=True)),
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


def find_format(found: Mapping[str, Any], formats: Mapping[str, RecordFormat]) -> str:
    """Return the first format with all fields present (not null), or ""."""
    for name, known in formats.items():
        if all(found.get(key) is not None for key in known.fields):
            if name == PREFERENCES and isinstance(found["chosen"], list):
                return PREFERENCE_MESSAGES
            return name
    return ""


def rejected_answer(record: Mapping[str, Any]) -> str:
    """Return the rejected answer of a preference, in either format."""
    rejected = record["rejected"]
    return str(rejected if isinstance(rejected, str) else rejected[-1]["content"])


def describe_unknown(
    found: list[tuple[str, dict[str, Any]]], formats: Mapping[str, RecordFormat]
) -> str:
    """Describe the error that no record of a file has the fields of any format."""
    there = set(found[0][1])
    has = ", ".join(sorted(map(str, there))[:10]) or "no fields"
    wanted = "; or ".join(" and ".join(f.fields) for f in formats.values())
    if PREFERENCES in formats:
        wanted = " and ".join(formats[PREFERENCES].fields)
    if {"chosen", "rejected"} <= there and PREFERENCES not in formats:
        advice = "for preferences say --objective dpo"
    elif PREFERENCES in formats:
        advice = "these are what --objective dpo needs"
    else:
        advice = "name other fields by --prompt-key and --completion-key"
    others = f", nor has any of the {len(found)} records" if len(found) > 1 else ""
    return f"has {has}, and not {wanted}{others}: {advice}"
