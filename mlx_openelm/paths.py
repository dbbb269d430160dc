"""Expansion of "~", for every path that a user gives."""

import os
from pathlib import Path
from typing import Annotated


def expand_home(path: str | Path) -> str:
    """Return a path or pattern with "~" expanded, which no shell does in "--option=~".

    "~user" stays as it is if this user has no home.
    """
    text = str(path)
    user = text.partition("/")[0]
    if not user.startswith("~") or "\0" in user:
        return text
    has_home = user == "~" or os.path.isdir(os.path.expanduser(user))
    return os.path.expanduser(text) if has_home else text


def user_path(path: str | Path) -> Path:
    """Return the path of a string, or a path, with "~" expanded."""
    return Path(expand_home(path))


# The type of a recipe's string that is a path, a pattern, or a name that can be a path.
PathText = Annotated[str, expand_home]
