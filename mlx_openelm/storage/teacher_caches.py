"""Folders in which the outputs of a teacher are kept.

cache.json     what they were computed from, and which outputs they are
*.safetensors  the outputs; written atomically, so a stopped computation resumes
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors

from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.message_parts import describe_error
from mlx_openelm.storage.shards import write_json
from mlx_openelm.storage.staging import lock_target, replaced_file

DESCRIPTION = "cache.json"
_FORMAT = 1


def check_cache(folder: Path, description: Mapping[str, Any]) -> None:
    """Raise OpenELMError if a folder is not, or not this, cache; it may be missing.

    Args:
        description: what determines the outputs, as JSON values; `content`, `teacher`
            and `data`, and options.
    """
    if not (folder / DESCRIPTION).is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OpenELMError(
                f"{folder} exists and is not a cache of a teacher; choose another "
                "`teacher_cache`."
            )
        return
    found = read_mapping(folder / DESCRIPTION)
    names = {
        "format": "another version of mlx-openelm",
        "teacher": "another teacher",
        "data": "other data",
    }
    for key, value in {"format": _FORMAT, **description}.items():
        if found.get(key) == value:
            continue
        problem = f"was computed with {names.get(key, f'another `{key}`')}"
        if key == "content":
            problem = f"has {found.get(key)}, not {value}"
        raise OpenELMError(
            f"The cache {folder} {problem}; choose another `teacher_cache`, or remove "
            "this one."
        )


@contextlib.contextmanager
def written_cache(folder: Path, description: Mapping[str, Any]) -> Iterator[None]:
    """Lock a cache while outputs are added; write its description first.

    Raises:
        OpenELMError: another process writes it, or it cannot be written.
    """
    with lock_target(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replaced_file(folder / DESCRIPTION) as path:
                write_json(path, {"format": _FORMAT, **description})
            yield
        except OSError as error:
            raise OpenELMError(
                f"Cannot write the teacher's cache {folder}: {describe_error(error)}; "
                "choose another `teacher_cache`."
            ) from error


def holds_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a file is whole and has tensors of these names and shapes."""
    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            found = {
                name: tuple(opened.get_slice(name).get_shape())
                for name in opened.keys()  # noqa: SIM118 - not a mapping
            }
    except (OSError, safetensors.SafetensorError):
        return False
    return found == dict(shapes)


def damaged(path: Path) -> OpenELMError:
    """Return the error of a file that cannot be read any more."""
    return OpenELMError(
        f"{path} is damaged or missing; repeat the command to compute it again."
    )
