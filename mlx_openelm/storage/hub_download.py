"""Downloads from the Hugging Face Hub, with resumption and one-sentence errors.

huggingface_hub resumes an interrupted file only within one process (measured with
2.4.0). Weights are gigabytes, so this module downloads them into the client's cache
itself and resumes where the last run stopped.
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

FIRST_RESPONSE_SECONDS = 5  # overridden by HF_HUB_ETAG_TIMEOUT
WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class RequestedFiles:
    """The files to download from a repository.

    Attributes:
        noun: what they are, for messages.
        choose: returns the needed files, given the names of all files; includes needed
            files that are not among them.
    """

    noun: str
    choose: Callable[[Collection[str]], list[str]]


def fetch(
    repo: str, requested: RequestedFiles, *, revision: str | None = None, state: str
) -> Path:
    """Download the requested files into the Hub cache; return the snapshot folder.

    Small files are downloaded first, so a snapshot with weights is complete.

    Args:
        state: what the local cache has, for messages.

    Raises:
        OpenELMError: the Hub is unreachable or denies access, the repository is not
            what was requested, the disk is full, or the download was interrupted.
    """
    from huggingface_hub import HfApi, constants

    started = False
    has_timeout = "HF_HUB_ETAG_TIMEOUT" in os.environ
    timeout = constants.HF_HUB_ETAG_TIMEOUT if has_timeout else FIRST_RESPONSE_SECONDS
    try:
        with silenced():
            info = HfApi().model_info(
                repo, revision=revision, files_metadata=True, timeout=timeout
            )
            started = True
            files = {file.rfilename: file for file in info.siblings or ()}
            names = requested.choose(files)
            _check_files(repo, requested.noun, names, files)
            weights = [n for n in names if n.endswith(WEIGHTS)]
            _check_free_disk(repo, [files[name] for name in weights])
            small = [name for name in names if name not in weights]
            folder = _download_snapshot(repo, small, revision)
            if weights:
                _check_model_type(repo, folder)
                for name in weights:
                    _fetch_weights(repo, folder.name, files[name])
                _download_snapshot(repo, weights, folder.name)
            return folder
    except OpenELMError:
        raise
    except Exception as error:  # the client's, httpx's and Rust's have no common base
        raise _explain(error, repo, revision, state, started=started) from error


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Silence the client's warnings; our errors contain what matters."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(max(before, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _download_snapshot(repo: str, names: list[str], revision: str | None) -> Path:
    """Download files with the client, which links them into a snapshot; no bar."""
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
    """Download a large file into the cache's blobs, from where the client links it.

    Until it is complete and its checksum is verified, the file has the name of an
    incomplete download, which `hf cache prune` removes.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    digest = file.lfs.sha256 if file.lfs else ""
    if not re.fullmatch("[0-9a-f]{64}", digest):
        return  # stored in git, so it is small; the client downloads it
    blob = _storage(repo) / "blobs" / digest
    part = blob.with_name(f"{digest}.incomplete")
    lock = _cache() / ".locks" / blob.parents[1].name / f"{digest}.lock"  # the client's
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
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
            actual = hashlib.file_digest(written, "sha256").hexdigest()
        if actual != digest:
            part.unlink()
            raise OpenELMError(
                f"{file.rfilename} of {repo} has the checksum {actual[:12]}..., not "
                f"{digest[:12]}... as on the Hub; repeat the command to download it "
                "again."
            )
        part.rename(blob)


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _storage(repo: str) -> Path:
    return _cache() / f"models--{repo.replace('/', '--')}"


# Checks and errors ---------------------------------------------------------------


def _check_files(
    repo: str, noun: str, names: list[str], files: Collection[str]
) -> None:
    missing = [name for name in names if name not in files]
    if missing:
        few = sorted(files)[:8]
        more = ", ..." if len(files) > len(few) else ""
        raise OpenELMError(
            f"{repo} has no {noun}: {missing[0]} is missing, its files are "
            f"{', '.join(few) or 'none'}{more}; choose another repository."
        )


def _check_model_type(repo: str, folder: Path) -> None:
    path = folder / "config.json"
    config = read_mapping(path) if path.is_file() else {}
    kind = config.get("model_type", "openelm")
    if kind != "openelm":
        raise OpenELMError(
            f"{repo} is a model of type {kind!r}, not an OpenELM; its weights were not "
            "downloaded."
        )


def _check_free_disk(repo: str, weights: list["RepoSibling"]) -> None:
    blobs = _storage(repo) / "blobs"
    needed = 0
    for file in weights:
        digest = file.lfs.sha256 if file.lfs else ""
        local = (blobs / name for name in (digest, f"{digest}.incomplete"))
        done = max((path.stat().st_size for path in local if path.is_file()), default=0)
        needed += (file.size or 0) - done
    disk = next(path for path in (blobs, *blobs.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise OpenELMError(
            f"The download of {repo} needs {needed / 1e9:.2f} GB, and the disk of "
            f"{_cache()} has {free / 1e9:.2f} GB free; free disk space, or set HF_HOME "
            "to a folder on another disk."
        )


def _explain(
    error: Exception, repo: str, revision: str | None, state: str, *, started: bool
) -> OpenELMError:
    """Return an error that describes in one sentence what happened and what to do."""
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
                f"{repo} is not a local folder, and the repository of that name is "
                "missing from the Hub or private: check the name, or log in with `hf "
                "auth login`."
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return OpenELMError(
                f"{repo} has no revision {revision}{_list_revisions(repo)}."
            )
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return OpenELMError(
                f"The disk of {_cache()} is full; free disk space and repeat the "
                "command to resume the download."
            )
        if isinstance(cause, OSError) and cause.filename is not None:
            return OpenELMError(f"Cannot write into the Hub cache {_cache()}: {cause}.")
        if _status_of(cause) == 401:
            return OpenELMError(f"{_REJECTED}.")
    reason = _first_line(causes[-1])
    if started:
        return OpenELMError(
            f"The download of {repo} was interrupted ({reason}); repeat the command to "
            "resume it."
        )
    return OpenELMError(
        f"{repo} is not a local folder, {state}, and the request to the Hub failed "
        f"({reason}); check the name, the network, and HF_ENDPOINT if it is set."
    )


def describe_refusal(error: Exception) -> str:
    """Return why a request that writes failed, without a full stop."""
    causes = list(_causes(error))
    reason = next(filter(None, map(_read_answer, causes)), _first_line(causes[-1]))
    for status in map(_status_of, causes):
        if status == 401:
            return _REJECTED
        if status == 403:
            return (
                f"{reason}; the token has no right to write there: create one with "
                "write access, and log in with `hf auth login`"
            )
        if status == 409:
            return "the repository exists already; choose another name"
    return reason


_REJECTED = (
    "The Hub rejected your token; create a new one and log in with `hf auth login`"
)


def _read_answer(error: BaseException) -> str | None:
    """Return the Hub's own description of an error, if it has one."""
    message = getattr(error, "server_message", None)
    return " ".join(message.split()).rstrip(".") if message else None


def _status_of(error: BaseException) -> int:
    """Return the HTTP status of an error of the Hub's client, else 0."""
    from huggingface_hub import errors

    if not isinstance(error, errors.HfHubHTTPError):
        return 0
    return int(getattr(error.response, "status_code", 0))


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

    with contextlib.suppress(Exception):  # the caller reports the first error
        refs = HfApi().list_repo_refs(repo)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        more = ", ..." if len(names) > 12 else ""
        return f"; it has {', '.join(names[:12])}{more}"
    return "; its page on the Hub lists the branches, tags and commits"
