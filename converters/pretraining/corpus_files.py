"""Find corpus files by patterns; report those that are missing."""

import fnmatch
import glob
import os
import re
from collections.abc import Sequence

from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import count_of

_MOST_SHOWN = 5  # missing files in a message
_MAX_RANGE = 10_000_000  # files of one range; more is a typing error


def find_files(patterns: Sequence[str], exclude: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the paths of the files that match the patterns, sorted, each file once.

    Args:
        patterns: shell patterns, with `**` for nested folders; `{00..99}` is a range
            of zero-padded numbers, and each of its files must exist.
        exclude: such patterns, matched by file identity, not by path; or patterns of
            file names in any folder.

    Raises:
        OpenELMError: a pattern matches nothing, files of a range are missing, or all
            files are excluded.
    """
    if not patterns:
        raise OpenELMError("The recipe's data names no files.")
    paths, missing = match_files(patterns)
    for name in missing:
        if name in patterns:  # not of a range
            raise OpenELMError(f"No file matches {name!r}; check the recipe's data.")
    if missing:
        shown = ", ".join(missing[:_MOST_SHOWN])
        more = len(missing) - _MOST_SHOWN
        rest = f" and {more} more" if more > 0 else ""
        verb = "is" if len(missing) == 1 else "are"
        raise OpenELMError(
            f"{count_of(len(missing), 'file')} of the recipe's data {verb} missing: "
            f"{shown}{rest}; download them, or correct the range."
        )
    names = [name for pattern in exclude for name in expand_ranges(pattern)]
    excluded = {_identify(path) for name in names for path in _match(name)}
    kept: dict[object, str] = {}
    for path in sorted(paths):
        named = any(fnmatch.fnmatch(os.path.basename(path), name) for name in names)
        if not named and (file := _identify(path)) not in excluded:
            kept.setdefault(file, path)
    if not kept:
        raise OpenELMError("The recipe's data excludes all of its files.")
    return tuple(kept.values())


def match_files(patterns: Sequence[str]) -> tuple[set[str], tuple[str, ...]]:
    """Return the paths that match, and the patterns and files of ranges without any."""
    paths: set[str] = set()
    missing: list[str] = []
    for pattern in patterns:
        for name in expand_ranges(pattern):
            matched = _match(name)
            paths |= matched
            if not matched:
                missing.append(name)
    return paths, tuple(missing)


def _match(pattern: str) -> set[str]:
    """Return the matching files; an existing path is taken literally."""
    if os.path.isfile(pattern):
        return {pattern}
    matched = glob.glob(pattern, recursive=True)
    return {path for path in matched if not os.path.isdir(path)}


def _identify(path: str) -> object:
    """Return a key that is the same for all paths to a file."""
    try:
        stat = os.stat(path)
    except OSError:  # such as a broken link, which is reported when it is read
        return path
    return stat.st_dev, stat.st_ino


_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand_ranges(pattern: str) -> list[str]:
    """Expand `{first..last}`, both ends included.

    Raises:
        OpenELMError: a range is descending or too long.
    """
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if not 0 <= int(last) - int(first) < _MAX_RANGE:
        raise OpenELMError(
            f"The range {match[0]} in {pattern!r} is descending or too long; write it "
            "as {first..last}."
        )
    head, tails = pattern[: match.start()], expand_ranges(pattern[match.end() :])
    numbers = range(int(first), int(last) + 1)
    return [f"{head}{n:0{len(first)}}{tail}" for n in numbers for tail in tails]


def contract_ranges(names: Sequence[str]) -> list[str]:
    """Write consecutive file names with consecutive numbers as `{first..last}`."""
    contracted: list[str] = []
    run: list[list[str]] = []  # names, split at their numbers
    for name in (*names, None):
        parts = [] if name is None else re.split(r"(\d+)", name)
        if run and _continues(run, parts):
            run.append(parts)
            continue
        if run:
            contracted.append(_contract(run))
        run = [parts]
    return contracted


def _continues(run: list[list[str]], parts: list[str]) -> bool:
    """Return whether a name has the next number of a run, at the same place."""
    places = _differences(run[-1], parts)
    if len(places) != 1 or (len(run) > 1 and places != _differences(*run[-2:])):
        return False
    before, after = run[-1][places[0]], parts[places[0]]
    width = len(before) == len(after)
    return width and before.isdecimal() and after == f"{int(before) + 1:0{len(before)}}"


def _differences(a: list[str], b: list[str]) -> list[int]:
    if len(a) != len(b):
        return []
    return [i for i in range(len(a)) if a[i] != b[i]]


def _contract(run: list[list[str]]) -> str:
    if len(run) == 1:
        return "".join(run[0])
    (place,) = _differences(*run[:2])
    first, last = run[0][place], run[-1][place]
    head, tail = "".join(run[0][:place]), "".join(run[0][place + 1 :])
    return f"{head}{{{first}..{last}}}{tail}"
