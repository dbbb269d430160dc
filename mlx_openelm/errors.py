"""The error type of the project, and lists of names in its messages."""

from collections.abc import Iterable


class OpenELMError(Exception):
    """An error for the user: what happened, where (file and line), and what to do.

    The message is a complete sentence. The command line prints it after "error:" and
    exits with code 1. Any other exception that reaches the user is a bug.
    """


def list_names(
    names: Iterable[object],
    *,
    most: int = 6,
    quoted: bool = True,
    separator: str = ", ",
) -> str:
    """Return names for a message: escaped if quoted, shortened, at most `most`."""
    shown = [ascii(name)[:100] if quoted else str(name)[:160] for name in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return (separator.join(shown[:most]) or "nothing") + more
