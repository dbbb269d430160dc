"""Provenance of a model: hashes of its source, entry of config.json, model card."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_openelm.storage.hub import snapshot_of
from mlx_openelm.version import __version__

_BLOCK = 2**20  # bytes hashed at a time


@contextmanager
def hashing(files: Sequence[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash files in a thread; yields a function that waits for the result.

    The result maps names relative to the files' common folder to "sha256:...".
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(_hash_files, files, stop)
        try:
            yield hashed.result
        finally:
            stop.set()  # after Ctrl-C, gigabytes may remain


def identify(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return path, size and modification time of each file, to detect changes."""
    return [
        (str(path), (stat := path.stat()).st_size, stat.st_mtime_ns)
        for path in (file.resolve() for file in files)
    ]


def describe_source(
    name: str, kind: str, folder: Path, hashes: dict[str, str]
) -> dict[str, Any]:
    """Return the entry "source" of config.json, for a Hub model with its commit."""
    described: dict[str, Any] = {"name": name, "kind": kind, "files": hashes}
    snapshot = snapshot_of(folder)
    if snapshot is not None:
        described["repo"], described["revision"] = snapshot
    return described


def write_card(
    folder: Path, name: str, kind: str, facts: Sequence[str], *, library: str
) -> None:
    """Write the model card, README.md.

    Args:
        facts: sentences about the model.
        library: mlx or transformers, by the folder's layout.
    """
    listed = "\n".join(f"- {fact}" for fact in facts)
    (folder / "README.md").write_text(
        f"""---
library_name: {library}
tags:
- {library}
- openelm
pipeline_tag: text-generation
---

# {name}

Converted by mlx-openelm {__version__} from {name} ({kind}); hashes of the source files
are in `config.json`. The licence is the source's.

{listed}

    mlx-openelm generate --model PATH --prompt "Once upon a time"
    mlx_lm.generate --model PATH --prompt "Once upon a time" --ignore-chat-template
""",
        encoding="utf-8",
        errors="replace",  # a file name may not be UTF-8
    )


def hash_file(path: Path, stop: threading.Event | None = None) -> str:
    """Return "sha256:..." of a file; the digest is invalid if `stop` was set."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as opened:
        while (block := opened.read(_BLOCK)) and not (stop and stop.is_set()):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _hash_files(files: Sequence[Path], stop: threading.Event) -> dict[str, str]:
    paths = [file.absolute() for file in files]
    common = os.path.commonpath([path.parent for path in paths])
    return {p.relative_to(common).as_posix(): hash_file(p, stop) for p in paths}
