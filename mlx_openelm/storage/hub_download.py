"""Fetching from the Hugging Face Hub: what is needed, resumed, errors in one sentence.

huggingface_hub does the work. It goes on with a cut file only while the process lives,
though (measured with 2.4.0), and weights are gigabytes: so a file of weights is brought
into its cache here, and goes on where the last run was stopped.
"""

import contextlib
import errno
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

FIRST_ANSWER_SECONDS = 5  # HF_HUB_ETAG_TIMEOUT, where it is set, goes before
WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of a repository.

    Attributes:
        noun: what it is, for messages.
        choose: from the names of all files, those that are needed; what it needs and
            is not among them it names nevertheless.
    """

    noun: str
    choose: Callable[[Collection[str]], list[str]]


def fetch(
    repo: str, wanted: Wanted, *, revision: str | None = None, state: str
) -> Path:
    """Bring what is wanted of a repository into the Hub cache, as a snapshot folder.

    The small files come first, so weights in a snapshot mean that it is whole.

    Args:
        state: what the local cache has of it, for messages.

    Raises:
        OpenELMError: the Hub is away or refuses, it is not what is wanted, the disk is
            full, or the download was interrupted.
    """
    from huggingface_hub import HfApi, constants

    begun = False
    given = "HF_HUB_ETAG_TIMEOUT" in os.environ
    timeout = constants.HF_HUB_ETAG_TIMEOUT if given else FIRST_ANSWER_SECONDS
    try:
        with _hushed():
            found = HfApi().model_info(
                repo, revision=revision, files_metadata=True, timeout=timeout
            )
            begun = True
            files = {file.rfilename: file for file in found.siblings or ()}
            names = wanted.choose(files)
            _refuse_what_is_not_wanted(repo, wanted.noun, names, files)
            weights = [n for n in names if n.endswith(WEIGHTS)]
            _refuse_small_disk(repo, [files[name] for name in weights])
            small = [name for name in names if name not in weights]
            folder = _take_snapshot(repo, small, revision)
            if weights:
                _refuse_other_models(repo, folder)
                for name in weights:
                    _fetch_weights(repo, folder.name, files[name])
                _take_snapshot(repo, weights, folder.name)
            return folder
    except OpenELMError:
        raise
    except Exception as error:  # the client's, httpx's and Rust's have no common base
        raise _explain(error, repo, revision, state, begun=begun) from error


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Silence the client's warnings: what matters of them is said in our errors."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(max(before, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _take_snapshot(repo: str, names: list[str], revision: str | None) -> Path:
    """Let the client bring files into the cache and link them; of small ones no bar."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    patterns = [glob.escape(name) for name in names]
    return Path(
        snapshot_download(
            repo, revision=revision, allow_patterns=patterns, tqdm_class=NoBar
        )
    )


def _fetch_weights(repo: str, commit: str, file: "RepoSibling") -> None:
    """Bring a large file into the cache's blobs, where the client links it from.

    What has come stays under the name that `hf cache prune` removes, until the whole
    has the Hub's checksum.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    digest = file.lfs.sha256 if file.lfs else ""
    if not re.fullmatch("[0-9a-f]{64}", digest):
        return  # small enough for git: the client's own download does
    blob = _storage(repo) / "blobs" / digest
    part = blob.with_name(f"{digest}.incomplete")
    lock = _cache() / ".locks" / blob.parents[1].name / f"{digest}.lock"  # the client's
    for place in (blob, lock):
        place.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        with part.open("ab") as opened:
            http_get(
                hf_hub_url(repo, file.rfilename, revision=commit),
                opened,
                resume_size=opened.tell(),
                headers=build_hf_headers(library_name="mlx-openelm"),
                expected_size=file.size,
                displayed_filename=file.rfilename,
            )
        with part.open("rb") as written:
            found = hashlib.file_digest(written, "sha256").hexdigest()
        if found != digest:
            part.unlink()
            raise OpenELMError(
                f"{file.rfilename} of {repo} came with the checksum {found[:12]}..., "
                f"where the Hub says {digest[:12]}...; repeat the command to download "
                "it anew."
            )
        part.rename(blob)


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _storage(repo: str) -> Path:
    return _cache() / f"models--{repo.replace('/', '--')}"


# Refusals ------------------------------------------------------------------------


def _refuse_what_is_not_wanted(
    repo: str, noun: str, names: list[str], files: Collection[str]
) -> None:
    missing = [name for name in names if name not in files]
    if missing:
        few = sorted(files)[:8]
        more = ", ..." if len(files) > len(few) else ""
        raise OpenELMError(
            f"{repo} holds no {noun}: it has no {missing[0]}, but "
            f"{', '.join(few) or 'nothing'}{more}; name another repository."
        )


def _refuse_other_models(repo: str, folder: Path) -> None:
    path = folder / "config.json"
    found = read_mapping(path) if path.is_file() else {}
    kind = found.get("model_type", "openelm")
    if kind != "openelm":
        raise OpenELMError(
            f"{repo} holds a model of type {kind!r}, and no OpenELM; its weights were "
            "not downloaded."
        )


def _refuse_small_disk(repo: str, weights: list["RepoSibling"]) -> None:
    blobs = _storage(repo) / "blobs"
    needed = 0
    for file in weights:
        digest = file.lfs.sha256 if file.lfs else ""
        here = (blobs / name for name in (digest, f"{digest}.incomplete"))
        had = max((path.stat().st_size for path in here if path.is_file()), default=0)
        needed += (file.size or 0) - had
    disk = next(path for path in (blobs, *blobs.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise OpenELMError(
            f"The download of {repo} needs {needed / 1e9:.2f} GB, and the disk of "
            f"{_cache()} has {free / 1e9:.2f} GB free; make room, or set HF_HOME to a "
            "folder on another disk."
        )


def _explain(
    error: Exception, repo: str, revision: str | None, state: str, *, begun: bool
) -> OpenELMError:
    """Say in one sentence what happened and what to do."""
    from huggingface_hub import errors

    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, errors.GatedRepoError):
            return OpenELMError(
                f"{repo} is gated: accept its terms on {_page(repo)}, log in with `hf "
                "auth login`, and repeat the command."
            )
        if isinstance(cause, errors.RepositoryNotFoundError):
            return OpenELMError(
                f"{repo} is no folder here, and the Hub has no repository of that "
                "name, or a private one: check the name, or log in with `hf auth "
                "login`."
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return OpenELMError(
                f"{repo} has no revision {revision}{_list_revisions(repo)}."
            )
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return OpenELMError(
                f"The disk of {_cache()} is full; make room and repeat the command, "
                "and the download goes on from there."
            )
        if isinstance(cause, OSError) and cause.filename is not None:
            return OpenELMError(f"Cannot write into the Hub cache {_cache()}: {cause}.")
        status = getattr(getattr(cause, "response", None), "status_code", 0)
        if isinstance(cause, errors.HfHubHTTPError) and status == 401:
            return OpenELMError(
                "The Hub does not accept your token; make a new one and log in with "
                "`hf auth login`."
            )
    reason = _first_line(causes[-1])
    if begun:
        return OpenELMError(
            f"The download of {repo} was interrupted ({reason}); repeat the command, "
            "and it goes on from where it stopped."
        )
    return OpenELMError(
        f"{repo} is no folder here, {state}, and asking the Hub failed ({reason}); "
        "check the name, the network, and HF_ENDPOINT where it is set."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def _list_revisions(repo: str) -> str:
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):  # it is a help, and what failed is said
        refs = HfApi().list_repo_refs(repo)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        more = ", ..." if len(names) > 12 else ""
        return f"; it has {', '.join(names[:12])}{more}"
    return "; its page shows the branches, tags and commits"
