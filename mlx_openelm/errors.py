"""The error type of the project."""

from collections.abc import Iterator
from contextlib import contextmanager

MAX_LENGTH = 2000  # characters of a message


class OpenELMError(Exception):
    """An error for the user: what happened, where (file and line), and what to do.

    The message is a complete sentence. The command line prints it after "error:" and
    exits with code 1. Any other exception that reaches the user is a bug. The middle of
    a message that is too long to read is left out: it quotes a file.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shorten(message))


@contextmanager
def package_of_extra(package: str, extra: str, use: str) -> Iterator[None]:
    """Raise OpenELMError if the block cannot import a package, which has a `use`."""
    try:
        yield
    except ImportError as error:
        raise OpenELMError(
            f"{use} requires the package {package}: pip install 'mlx-openelm[{extra}]'."
        ) from error


def shorten(text: str, most: int = MAX_LENGTH) -> str:
    """Return a text of at most `most` characters, at least 1000, without its middle."""
    if len(text) <= most:
        return text
    start, end = text[: most - 500], text[-450:]
    return f"{start} [... {len(text) - len(start) - len(end)} characters] {end}"
