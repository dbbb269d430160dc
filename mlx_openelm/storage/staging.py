"""Atomic writing of folders and files.

A result is written into a hidden sibling, flushed to the disk and renamed at the end.
Readers never see an incomplete result, and a crash leaves the old one or the new one.
The sibling's name contains a hash of the job, so that a later run finds what a killed
run has left, and resumes or removes it:

    .NAME.0123456789ab.lock   lock file; created first and removed last
    .NAME.0123456789ab.part   the folder that is being written
    .NAME.0123456789ab.done   the same folder during the rename; never resumed, as
                              after the rename it is the old result
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import IO, Any, Literal

from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import cannot_access, count_of
from mlx_openelm.storage.file_checks import refuse_file_above

SHARD_FILES = "model*.safetensors"  # files with such a name are complete
SAVED_STATE = "learning"  # folder of a computation that resumes; removed before the end

_MARK = b"mlx-openelm writes here, or was killed while it did.\n"


@contextlib.contextmanager
def staged_folder(
    target: Path, *, force: bool = False, job: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Yield a folder to write in, which becomes `target` if the block succeeds.

    Args:
        force: replace an existing target, if `refuse_existing` allows it.
        job: everything that determines the result, as JSON values. With it, the folder
            contains only the complete shards and the `SAVED_STATE` of a stopped run of
            the same job, and Ctrl-C and SIGTERM keep them, with a note on their
            exception. Without it, the folder is empty.

    Raises:
        OpenELMError: the target exists and `force` is off, another process is writing
            it, or the disk is full or fails; nothing is kept.
    """
    refuse_existing(target, force=force)
    with _explain_errors(target), _parents(target), _workplace(target, job) as staging:
        yield staging
        _remove(staging / SAVED_STATE)
        for path in (*staging.rglob("*"), staging):
            flush(path)
        done = staging.rename(staging.with_suffix(".done"))
        _rename_to_target(done, target, force)
        flush(target.parent)


@contextlib.contextmanager
def staged_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a path for one file, which becomes `target` if the block succeeds.

    Raises:
        OpenELMError: as `staged_folder`.
    """
    refuse_existing_file(target, force=force)
    with _explain_errors(target), _parents(target), _workplace(target) as staging:
        path = staging / target.name
        yield path
        flush(path)
        refuse_existing_file(target, force=force)  # created in the meantime?
        path.replace(target)
        flush(target.parent)


@contextlib.contextmanager
def lock_target(target: Path) -> Iterator[None]:
    """Lock `target`, which need not exist, against other processes.

    Raises:
        OpenELMError: another process has locked it, or its folder is not writable.
    """
    lock = target.parent / f".{target.name}.held"
    message = (
        f"{target} is in use by another process; wait for it, or choose another path."
    )
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_parents(target))
            stack.enter_context(lock_file(lock, message))
        except OSError as error:
            raise OpenELMError(
                f"Cannot write {target}: {error.strerror or error}; choose another "
                "path."
            ) from error
        yield


@contextlib.contextmanager
def lock_file(path: Path, message: str, *, required: bool = True) -> Iterator[None]:
    """Lock a file and remove it at the end; if the process dies, it is unlocked.

    Args:
        message: the error if another process has locked it.
        required: fail if the file system does not support locks; else continue.

    Raises:
        OpenELMError: another process has locked it.
    """
    with path.open("ab") as opened:
        try:
            _lock(opened)
        except BlockingIOError as error:
            raise OpenELMError(message) from error
        except OSError:
            if required:
                raise
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """Yield a path to write at, which replaces `target` if the block succeeds.

    For files of ours that are written repeatedly. The old file stays until the new one
    is complete on the disk.

    Raises:
        OSError: the file cannot be written; the old file is unchanged.
    """
    # safetensors needs the suffix; torch names a .pt archive after the stem.
    part = target.with_name(f".{target.name}{target.suffix}")
    try:
        yield part
        flush(part)
        part.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    flush(target.parent)


# What may be replaced ------------------------------------------------------------


def refuse_replacing(target: Path, files: Iterable[Path]) -> None:
    """Raise OpenELMError if writing the target would replace one of these files."""
    resolved = target.resolve()
    for file in files:
        link = file.parent.resolve() / file.name  # files in the Hub cache are links
        if any(path.is_relative_to(resolved) for path in (link, file.resolve())):
            raise OpenELMError(
                f"{target} holds the source itself, which would be lost; choose "
                "another path."
            )


def refuse_nested(what: str, path: Path, other: str, other_path: Path) -> None:
    """Raise OpenELMError if one of two folders to write is the other or inside it."""
    one, two = path.resolve(), other_path.resolve()
    if one.is_relative_to(two) or two.is_relative_to(one):
        raise OpenELMError(
            f"The {what} ({path}) and the {other} ({other_path}) need separate "
            "folders, neither inside the other."
        )


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise OpenELMError if `target` exists and must not be replaced by a folder.

    To protect other files from a typing error, `force` replaces only an empty folder or
    one that holds nothing but a model or an adapter.
    """
    _refuse(target, force, _describe_foreign)


def refuse_existing_file(target: Path, *, force: bool) -> None:
    """Raise OpenELMError if `target` exists and must not be replaced by a file.

    `force` replaces only .pt and .gguf files, recognised by name and first bytes.
    """
    _refuse(target, force, _describe_foreign_file)


def _refuse(target: Path, force: bool, describe: Callable[[Path], str]) -> None:
    if not os.path.lexists(target):
        return
    foreign = describe(target)
    if foreign:
        found = f"{target} {'' if force else 'exists already; it '}{foreign}"
        raise OpenELMError(
            f"{found}, so `force` does not replace it; choose another path or remove "
            "it yourself."
        )
    if not force:
        raise OpenELMError(
            f"{target} exists already; choose another path, or pass `force` to replace "
            "it."
        )


_MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".jinja")
CODE_FILES = ("configuration_openelm.py", "modeling_openelm.py", "reference.py")
_MODEL_FILES = (
    *("README.md", "metrics.jsonl", "recipe.yaml", "report.html"),
    *CODE_FILES,  # of a folder for transformers
)
_ADAPTER_FOLDERS = ("best", "average")  # in a training run's folder
_TENSORBOARD, _EVENT_FILES = "tensorboard", "events.out.tfevents."
_GROWN_FILES = (  # what `grow` writes; the first two always
    *("checkpoint.pt", "config.json", "tokenizer.model", "generation_config.json"),
)
_IGNORED = (".DS_Store", ".gitattributes")


def _describe_foreign(target: Path) -> str:
    """Return why `target` is not, or not only, a model or an adapter; else ""."""
    if target.is_symlink() or not target.is_dir():
        return "is not a model or adapter folder"
    paths = sorted(path for path in target.iterdir() if path.name not in _IGNORED)
    names = {path.name for path in paths}
    if names.issuperset(_GROWN_FILES[:2]) and names.issubset(_GROWN_FILES):
        return ""
    has_config = bool(names & {"config.json", "adapter_config.json"})
    if paths and not (has_config and any(n.endswith(".safetensors") for n in names)):
        return "is not a model or adapter folder"
    for path in paths:
        if path.name in _ADAPTER_FOLDERS and not _describe_foreign(path):
            continue
        if path.name == _TENSORBOARD and _holds_event_files(path):
            continue
        expected = path.suffix in _MODEL_SUFFIXES or path.name in _MODEL_FILES
        if not expected or not path.is_file():
            return f"holds {path.name}, which is not part of a model"
    return ""


def _holds_event_files(folder: Path) -> bool:
    """Whether a folder holds event files of TensorBoard and nothing else."""
    return folder.is_dir() and all(
        path.name.startswith(_EVENT_FILES) for path in folder.iterdir()
    )


_FIRST_BYTES = {".pt": b"PK\x03\x04", ".gguf": b"GGUF"}


def _describe_foreign_file(target: Path) -> str:
    """Return why `target` is not the .pt or .gguf file of its suffix; else ""."""
    first = _FIRST_BYTES.get(target.suffix)
    if target.is_symlink() or not target.is_file() or first is None:
        return f"is not a {' or '.join(_FIRST_BYTES)} file"
    with target.open("rb") as opened:
        return "" if opened.read(4) == first else f"is not a {target.suffix} file"


# The hidden sibling --------------------------------------------------------------


@contextlib.contextmanager
def _workplace(target: Path, job: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Yield the locked hidden folder; remove it at the end unless shards are kept."""
    digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
    lock = target.parent / f".{target.name}.{digest[:12]}.lock"
    part = lock.with_suffix(".part")
    try:
        locked = _open_locked(lock, "a+b")
    except BlockingIOError as error:
        raise OpenELMError(
            f"{target} is being written by another process; wait for it, or choose "
            "another path."
        ) from error
    kept = False
    with locked:
        try:
            if locked.tell() == 0:
                locked.write(_MARK)
                flush(lock)
            _remove_leftovers(target, lock)
            _remove(lock.with_suffix(".done"))
            if part.is_symlink():
                part.unlink()
            part.mkdir(exist_ok=True)
            for path in set(part.iterdir()) - _resumable(part, job):
                _remove(path)
            yield part
        except (KeyboardInterrupt, SystemExit) as stopped:
            left = _resumable(part, job)
            kept = bool(left)
            if kept:
                shards = len(left - {part / SAVED_STATE})
                what = count_of(shards, "complete shard") if shards else "its last save"
                stopped.add_note(f"The same command resumes from {what}.")
            raise
        finally:
            if not kept:
                _remove_with_lock(lock)


def _resumable(part: Path, job: Mapping[str, Any] | None) -> set[Path]:
    """Return what a run can resume from: shards, a state; without a job, nothing."""
    if job is None:
        return set()
    return {*part.glob(SHARD_FILES), *part.glob(SAVED_STATE)}


def _open_locked(path: Path, mode: Literal["a+b", "r+b"]) -> FileIO:
    """Open a file and lock it; errors as `_lock`."""
    opened = path.open(mode, buffering=0)
    try:
        _lock(opened)
    except BaseException:
        opened.close()
        raise
    return opened


def _lock(opened: IO[bytes]) -> None:
    """Lock a file until it is closed or the process ends.

    Raises:
        BlockingIOError: another process has locked it, or has just removed it.
    """
    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if os.fstat(opened.fileno()).st_nlink == 0:
        raise BlockingIOError(errno.EWOULDBLOCK, "removed", opened.name)


def _remove_leftovers(target: Path, own: Path) -> None:
    """Remove what killed runs of other jobs have left next to the target."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{12}\.lock")
    for lock in sorted(target.parent.iterdir()):
        if pattern.fullmatch(lock.name) and lock != own and lock.is_file():
            with contextlib.suppress(OSError), _open_locked(lock, "r+b") as locked:
                if locked.read() == _MARK:
                    _remove_with_lock(lock)


def _remove_with_lock(lock: Path) -> None:
    """Remove a hidden folder; the lock last, as leftovers are found by it."""
    try:
        _remove(lock.with_suffix(".part"))
    finally:
        try:
            _remove(lock.with_suffix(".done"))
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Create the folders above the target; remove those that stay empty."""
    refuse_file_above(target)
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _explain_errors(target: Path) -> Iterator[None]:
    """Turn OSErrors into OpenELMErrors that name the target."""
    try:
        yield
    except (OSError, OpenELMError) as error:
        cause = error.__cause__ if isinstance(error, OpenELMError) else error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OpenELMError(
                f"The disk of {target} is full; nothing was kept. Free disk space and "
                "repeat."
            ) from error
        if isinstance(error, OpenELMError):
            raise
        raise OpenELMError(cannot_access(target, error, "write")) from error


# The disk ------------------------------------------------------------------------


def _rename_to_target(staging: Path, target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        staging.rename(target)
        return
    refuse_existing(target, force=force)  # created in the meantime?
    if _exchange(staging, target):
        return  # the old one now has the staging name and is removed by the caller
    # The file system cannot exchange names: two steps, the old one kept in between.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    target.rename(aside / target.name)
    try:
        staging.rename(target)
    except BaseException:
        (aside / target.name).rename(target)
        aside.rmdir()
        raise
    _remove(aside)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically; False if the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    try:
        if sys.platform == "darwin":
            failed = libc.renamex_np(first, second, 0x2)  # RENAME_SWAP
        else:
            at_cwd, exchange = -100, 0x2  # AT_FDCWD, RENAME_EXCHANGE
            failed = libc.renameat2(at_cwd, first, at_cwd, second, exchange)
    except AttributeError:
        return False
    return bool(failed == 0)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin" and path.is_file():
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a folder or a file, ignoring errors."""
    try:
        shutil.rmtree(path, ignore_errors=True)
    finally:  # again, after a Ctrl-C during the first attempt
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
