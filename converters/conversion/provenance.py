"""Where a model came from: hashes of its files, config.json's entry, the model card."""

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
    """Hash files on a thread of its own; the given function waits for the outcome.

    It returns name -> "sha256:...", the names relative to the files' common folder.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(_hash_files, files, stop)
        try:
            yield hashed.result
        finally:
            stop.set()  # on Ctrl-C there are gigabytes to come


def identify(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return what tells that files have not changed: path, bytes, time of change."""
    return [
        (str(path), (found := path.stat()).st_size, found.st_mtime_ns)
        for path in (file.resolve() for file in files)
    ]


def describe_source(
    name: str, kind: str, folder: Path, hashes: dict[str, str]
) -> dict[str, Any]:
    """Return config.json's "source": what was converted; of the Hub, which commit."""
    described: dict[str, Any] = {"name": name, "kind": kind, "files": hashes}
    snapshot = snapshot_of(folder)
    if snapshot is not None:
        described["repo"], described["revision"] = snapshot
    return described


def write_card(
    folder: Path, name: str, kind: str, facts: Sequence[str], *, library: str
) -> None:
    """Write README.md, the model card, from sentences about the model.

    Args:
        library: whose layout the folder has, mlx or transformers.
    """
    told = "\n".join(f"- {fact}" for fact in facts)
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

{told}

    mlx-openelm generate --model PATH --prompt "Once upon a time"
    mlx_lm.generate --model PATH --prompt "Once upon a time" --ignore-chat-template
""",
        encoding="utf-8",
        errors="replace",  # a file's name may be no UTF-8
    )


def hash_file(path: Path, stop: threading.Event | None = None) -> str:
    """Return "sha256:..." of a file; of no use if it was stopped on the way."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as opened:
        while (block := opened.read(_BLOCK)) and not (stop and stop.is_set()):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _hash_files(files: Sequence[Path], stop: threading.Event) -> dict[str, str]:
    whole = [file.absolute() for file in files]
    common = os.path.commonpath([file.parent for file in whole])
    return {f.relative_to(common).as_posix(): hash_file(f, stop) for f in whole}
