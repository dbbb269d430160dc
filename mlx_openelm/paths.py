"""Expansion of "~", for every path that a user gives."""

import os
from pathlib import Path
from typing import Annotated


def expand_home(path: str | Path) -> str:
    """Return a path or pattern with "~" expanded, which no shell does in "--option=~".

    The "~" of an unknown user stays as it is.
    """
    return os.path.expanduser(str(path))


def user_path(path: str | Path) -> Path:
    """Return the path of a string, or a path, with "~" expanded."""
    return Path(expand_home(path))


# The type of a recipe's string that is a path, a pattern, or a name that can be a path.
PathText = Annotated[str, expand_home]
