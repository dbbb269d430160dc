"""Checks of paths before they are read or written."""

import os
from pathlib import Path

from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import PLACEHOLDERS, describe_start
from mlx_openelm.message_parts import cannot_access


def refuse_unreadable(path: Path) -> os.stat_result:
    """Return the status of a regular file that can be read.

    Raises:
        OpenELMError: it is missing, is not a file, may not be read, or is a pointer of
            Git LFS or a web page instead of the file.
    """
    try:
        if not path.is_file():  # opening a pipe would block
            kind = "a folder" if path.is_dir() else "missing or not a file"
            raise OpenELMError(f"{path} is {kind}.")
        with path.open("rb") as file:
            start, stat = file.read(64), os.fstat(file.fileno())
    except (OSError, ValueError) as error:  # also an invalid name
        raise OpenELMError(cannot_access(path, error)) from error
    if problem := describe_start(start, PLACEHOLDERS):
        raise OpenELMError(f"{path} {problem}.")
    return stat


def refuse_file_above(path: Path) -> None:
    """Raise OpenELMError if a folder above a path that will be written is a file."""
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise OpenELMError(
                f"Cannot write {path}: {folder} is not a folder; choose another path."
            )
