"""Checks of a file before it is read: missing, not readable, or not the file itself."""

import os
from pathlib import Path

from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import describe_error

_PLACEHOLDERS = {  # first bytes -> what the file is, and what to do
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run git "
    "lfs pull in its folder, or download the file again",
    b"<!doctype html": "is a web page, not the file itself; download the file, not "
    "the page that describes it",
    b"<html": "is a web page, not the file itself; download the file, not the page "
    "that describes it",
}


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
            start, stat = file.read(64).lower(), os.fstat(file.fileno())
    except PermissionError as error:
        raise OpenELMError(
            f"{path} may not be read by this user (permission denied); change its "
            "permissions."
        ) from error
    except (OSError, ValueError) as error:  # also an invalid name
        raise OpenELMError(f"Cannot read {path}: {describe_error(error)}.") from error
    for beginning, kind in _PLACEHOLDERS.items():
        if start.startswith(beginning):
            raise OpenELMError(f"{path} {kind}.")
    return stat
