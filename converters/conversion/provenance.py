"""Provenance of a model: hashes of its source, and the entry of config.json."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_openelm.storage.address_download import origin_of
from mlx_openelm.storage.hub import snapshot_of

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
    """Return the entry "source" of config.json, with its commit or address."""
    described: dict[str, Any] = {"name": name, "kind": kind, "files": hashes}
    snapshot = snapshot_of(folder)
    if snapshot is not None:
        described["repo"], described["revision"] = snapshot
    if origin := origin_of(folder):
        described["address"] = origin.url
    return described


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
