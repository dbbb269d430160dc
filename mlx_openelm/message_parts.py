"""Parts of messages: a count, a number, a list of names, the reason of an error."""

from collections.abc import Iterable


def count_of(number: int, noun: str) -> str:
    """Return a count with its noun: "1 record", "2,000 records"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def plain_number(value: float) -> str:
    """Return a number in digits; a whole one has no decimal point or exponent."""
    whole = abs(value) < 1e15 and value == int(value)
    return str(int(value)) if whole else f"{value}"


def describe_error(error: Exception) -> str:
    """Return the reason of an error in one line, without Python's number and path."""
    reason = error.strerror if isinstance(error, OSError) else None
    text = f"{reason[:1].lower()}{reason[1:]}" if reason else str(error)
    return " ".join(text.split())


def cannot_access(path: object, error: Exception, verb: str = "read") -> str:
    """Return the sentence on a file that cannot be read, or written, and what to do."""
    advice = "; change its permissions" if isinstance(error, PermissionError) else ""
    return f"Cannot {verb} {path}: {describe_error(error)}{advice}."


def describe_failure(error: Exception) -> str:
    """Return the message of an error; of an `OSError` of a file, its sentence."""
    if isinstance(error, OSError) and error.filename is not None:
        return cannot_access(error.filename, error, "access")
    return f"{error}".rstrip(".") + "."


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
