"""Checks of strings and chat messages, {"role", "content"}, read from JSON.

As in OpenAI's API, a content is a string or a list of parts, {"type": "text", "text"},
and the role "developer" is another name of "system".
"""

from collections.abc import Mapping
from typing import Any

from mlx_openelm.input_files import find_unpaired_surrogate
from mlx_openelm.text.record_files import describe_type
from mlx_openelm.text.templates import Turn

ROLES = ("system", "user", "assistant")
_OTHER_NAMES = {"developer": "system"}


def check_messages(
    value: Any, key: str = "messages", *, not_empty: str = ""
) -> tuple[tuple[Turn, ...], list[str]]:
    """Return the turns of a list of messages, and every problem with it.

    Args:
        key: the name of the list in the problems.
        not_empty: a role whose messages must not be blank.

    Returns:
        One turn per message, valid only if there are no problems; the problems, without
        full stop: "messages[0].role is 'tool', not system, user or assistant".
    """
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else describe_type(value)
        return (), [f"{key} is {kind}, not a list of messages"]
    turns, problems = [], []
    for i, message in enumerate(value):
        name = f"{key}[{i}]"
        if not isinstance(message, dict):
            problems.append(f"{name} is {describe_type(message)}, not a message")
            turns.append(Turn("", ""))
            continue
        role, content = read_role(message), read_content(message)
        if role not in ROLES:
            problems.append(
                f"{name}.role is {role!r:.60}, not system, user or assistant"
            )
        problem = describe_text_problem(content)
        if content is None:
            problems.append(f"{name} has no content")
        elif isinstance(content, list):
            problems.append(f"{name}.content is a list with parts that are not text")
        elif problem:
            problems.append(f"{name}.content {problem}")
        elif role == not_empty and not content.strip():
            problems.append(f"{name}.content is empty")
        turns.append(Turn(str(role), content if isinstance(content, str) else ""))
    return tuple(turns), problems


def read_role(message: Mapping[str, Any]) -> Any:
    """Return the role of a message; "developer" is the system."""
    role = message.get("role")
    return _OTHER_NAMES.get(role, role) if isinstance(role, str) else role


def read_content(message: Mapping[str, Any]) -> Any:
    """Return the content of a message; parts that are all texts are joined."""
    content = message.get("content")
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                return content
    return "".join(texts)


def describe_text_problem(value: Any) -> str:
    """Return why a value cannot be encoded as text; empty if it can."""
    if not isinstance(value, str):
        return f"is {describe_type(value)}, not a string"
    surrogate = find_unpaired_surrogate(value)
    return f"contains the unpaired surrogate {surrogate}" if surrogate else ""
