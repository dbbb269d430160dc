"""Names of models that are similar to a name that was not found, for its error."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from mlx_openelm.paths import user_path

_CUTOFF = 0.8  # of difflib's ratio: one wrong letter in a short name


def suggest_similar(name: str, known: Sequence[str], config: str) -> str:
    """Return a sentence with the nearest local folder and known name, or "".

    Args:
        known: names that are valid anywhere; the part after "/" also counts alone.
        config: the file that a folder must have to be proposed.
    """
    folder = user_path(name).parent
    try:
        local = [str(path.parent) for path in folder.glob(f"*/{config}")]
    except OSError:  # the folder cannot be read
        local = []
    near = (_find_nearest(name, local), _find_nearest(name, known))
    found = [match for match in near if match is not None]
    return f" Similar names: {', '.join(found)}." if found else ""


def _find_nearest(name: str, candidates: Sequence[str]) -> str | None:
    wanted = {_simplify(name), _simplify(Path(name).name)}
    scores = {
        candidate: max(
            difflib.SequenceMatcher(None, one, other).ratio()
            for one in wanted
            for other in (_simplify(candidate), _simplify(Path(candidate).name))
        )
        for candidate in sorted(candidates)
    }
    best = max(scores, key=scores.__getitem__, default=None)
    return best if best is not None and scores[best] >= _CUTOFF else None


def _simplify(name: str) -> str:
    """Return a name's letters and digits, in lower case."""
    return "".join(filter(str.isalnum, name.casefold()))
