"""Checks of texts and of messages, {"role", "content"}, that come from JSON files."""

from typing import Any

from mlx_openelm.text.record_files import describe_type
from mlx_openelm.text.templates import Turn

ROLES = ("system", "user", "assistant")


def check_messages(
    value: Any, key: str = "messages", *, not_empty: str = ""
) -> tuple[tuple[Turn, ...], list[str]]:
    """Return the turns of a list of messages, and every problem with it.

    Args:
        key: names the list in the problems.
        not_empty: a role whose messages must hold more than white space.

    Returns:
        A turn a message, to be used where there are no problems; problems without a
        full stop, such as "messages[0].role is 'tool', not system, user or assistant".
    """
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else describe_type(value)
        return (), [f"{key} is {what}, not a list of messages"]
    turns, problems = [], []
    for i, message in enumerate(value):
        here = f"{key}[{i}]"
        if not isinstance(message, dict):
            problems.append(f"{here} is {describe_type(message)}, not a message")
            turns.append(Turn("", ""))
            continue
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            problems.append(f"{here}.role is {role!r}, not system, user or assistant")
        elif role == "system" and i:
            problems.append(f"{here} is a system message, but not the first")
        problem = describe_text_problem(content)
        if content is None:
            problems.append(f"{here} has no content")
        elif problem:
            problems.append(f"{here}.content {problem}")
        elif role == not_empty and not content.strip():
            problems.append(f"{here}.content is empty")
        turns.append(Turn(str(role), content if isinstance(content, str) else ""))
    return tuple(turns), problems


def describe_text_problem(value: Any) -> str:
    """Return why a value cannot be encoded as text; empty where it can."""
    if not isinstance(value, str):
        return f"is {describe_type(value)}, not a text"
    half = find_half_character(value)
    return f"holds {half}, half of a character" if half else ""


def find_half_character(text: str) -> str:
    r"""Return the first half of a surrogate pair that stands alone, as "\ud83d"."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return ascii(text[error.start])[1:-1]
    return ""
