"""A result is written whole or not at all.

It grows in a hidden sibling, is flushed to the disk and takes its name at the end, so a
reader never sees half of it and a crash leaves the old one or the new one. The
sibling's name stands for the target and the job, so what a killed run has left is found
again, and continued or removed:

    .NAME.0123456789ab.lock   held by who works at it; made first and removed last
    .NAME.0123456789ab.part   the folder that grows
    .NAME.0123456789ab.done   the same while names are exchanged; never continued,
                              since after that it is the old one
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

SHARD_FILES = "model*.safetensors"  # what has such a name is whole

_MARK = b"mlx-openelm writes here, or was killed while it did.\n"


@contextlib.contextmanager
def staged_folder(
    target: Path, *, force: bool = False, job: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Give a folder to write in; it becomes `target` if the block succeeds.

    Args:
        force: replace what is there, if `refuse_existing` agrees.
        job: all that decides what will be written, as JSON has it. With it, the folder
            holds the whole shards (and nothing else) that a stopped run of the same job
            has left; Ctrl-C and SIGTERM leave them too, and their exception says so in
            a note. Without it, the folder is empty.

    Raises:
        OpenELMError: the target exists and `force` is off, another process is writing
            it, or the disk refuses; nothing is kept.
    """
    refuse_existing(target, force=force)
    with _in_one_sentence(target), _parents(target), _workplace(target, job) as staging:
        yield staging
        for path in (*staging.rglob("*"), staging):
            flush(path)
        done = staging.rename(staging.with_suffix(".done"))
        _take_name(done, target, force)
        flush(target.parent)


@contextlib.contextmanager
def staged_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a path to write one file at; it becomes `target` if the block succeeds.

    Raises:
        OpenELMError: as `staged_folder`.
    """
    refuse_existing_file(target, force=force)
    with _in_one_sentence(target), _parents(target), _workplace(target) as staging:
        path = staging / target.name
        yield path
        flush(path)
        refuse_existing_file(target, force=force)  # it may have come meanwhile
        path.replace(target)
        flush(target.parent)


@contextlib.contextmanager
def held(target: Path) -> Iterator[None]:
    """Keep out whoever else would hold `target`, which need not be there yet.

    Raises:
        OpenELMError: another process holds it.
    """
    lock = target.parent / f".{target.name}.held"
    refusal = (
        f"{target} is in use by another process; wait for it, or choose another place."
    )
    with _parents(target), lock_file(lock, refusal):
        yield


@contextlib.contextmanager
def lock_file(path: Path, refusal: str, *, required: bool = True) -> Iterator[None]:
    """Hold a lock file, which is removed at the end, or unlocked if the process dies.

    Args:
        refusal: the message where another process holds it.
        required: fail where the file system has no locks; else go on without one.

    Raises:
        OpenELMError: another process holds it.
    """
    with path.open("ab") as opened:
        try:
            _lock(opened)
        except BlockingIOError as error:
            raise OpenELMError(refusal) from error
        except OSError:
            if required:
                raise
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """Give a path to write at; it takes the place of `target` if the block succeeds.

    For a file of our own that is written again and again: until the new one is whole
    and on the disk, the old one stays.

    Raises:
        OSError: the disk refuses; the old file is as it was.
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
        link = file.parent.resolve() / file.name  # a file in the Hub cache is one
        if any(path.is_relative_to(resolved) for path in (link, file.resolve())):
            raise OpenELMError(
                f"{target} holds the source itself, and replacing it would lose it; "
                "choose another place."
            )


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise if something is at `target` that must not be replaced.

    `force` replaces a folder that holds a model or an adapter and nothing else, or
    nothing at all: a slip of the pen must not cost what a person has made.
    """
    _refuse(target, force, _describe_foreign)


def refuse_existing_file(target: Path, *, force: bool) -> None:
    """Raise if something is at `target` that must not be replaced by a file.

    `force` replaces a file that its name and its first bytes call a .pt or a .gguf.
    """
    _refuse(target, force, _describe_foreign_file)


def _refuse(target: Path, force: bool, describe: Callable[[Path], str]) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        raise OpenELMError(
            f"{target} exists already; choose another place, or say `force` to replace "
            "it."
        )
    foreign = describe(target)
    if foreign:
        raise OpenELMError(
            f"{target} {foreign}, so `force` does not replace it; choose another place "
            "or remove it yourself."
        )


_MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".jinja")
_MODEL_FILES = ("README.md", "metrics.jsonl", "recipe.yaml", "report.html")
_ADAPTER_FOLDERS = ("best", "average")  # in a training run's folder
_TENSORBOARD, _EVENT_FILES = "tensorboard", "events.out.tfevents."
_GROWN_FILES = (  # what `grow` writes; the first two always
    *("checkpoint.pt", "config.json", "tokenizer.model", "generation_config.json"),
)
_CLUTTER = (".DS_Store", ".gitattributes")  # nobody's work


def _describe_foreign(target: Path) -> str:
    """Say why something is more, or other, than a model or an adapter; else nothing."""
    if target.is_symlink() or not target.is_dir():
        return "is not a model or adapter folder"
    found = sorted(path for path in target.iterdir() if path.name not in _CLUTTER)
    names = {path.name for path in found}
    if names.issuperset(_GROWN_FILES[:2]) and names.issubset(_GROWN_FILES):
        return ""
    described = bool(names & {"config.json", "adapter_config.json"})
    if found and not (described and any(n.endswith(".safetensors") for n in names)):
        return "is not a model or adapter folder"
    for path in found:
        if path.name in _ADAPTER_FOLDERS and not _describe_foreign(path):
            continue
        if path.name == _TENSORBOARD and _holds_event_files(path):
            continue
        known = path.suffix in _MODEL_SUFFIXES or path.name in _MODEL_FILES
        if not known or not path.is_file():
            return f"holds {path.name}, which is no part of a model"
    return ""


def _holds_event_files(folder: Path) -> bool:
    """Whether a folder holds event files of TensorBoard and nothing else."""
    return folder.is_dir() and all(
        path.name.startswith(_EVENT_FILES) for path in folder.iterdir()
    )


_FIRST_BYTES = {".pt": b"PK\x03\x04", ".gguf": b"GGUF"}


def _describe_foreign_file(target: Path) -> str:
    """Say why something is no .pt or .gguf file, whichever its name says; else none."""
    first = _FIRST_BYTES.get(target.suffix)
    if target.is_symlink() or not target.is_file() or first is None:
        return f"is not a {' or '.join(_FIRST_BYTES)} file"
    with target.open("rb") as opened:
        return "" if opened.read(4) == first else f"is not a {target.suffix} file"


# The hidden sibling --------------------------------------------------------------


@contextlib.contextmanager
def _workplace(target: Path, job: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Give the hidden folder, locked; it is removed afterwards unless shards stay."""
    digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
    lock = target.parent / f".{target.name}.{digest[:12]}.lock"
    part = lock.with_suffix(".part")
    try:
        locked = _open_locked(lock, "a+b")
    except BlockingIOError as error:
        raise OpenELMError(
            f"{target} is being written by another process; wait for it, or choose "
            "another place."
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
            for path in set(part.iterdir()) - _whole_shards(part, job):
                _remove(path)
            yield part
        except (KeyboardInterrupt, SystemExit) as stopped:
            count = len(_whole_shards(part, job))
            kept = count > 0
            if kept:
                shards = f"{count} whole shard{'s' if count > 1 else ''}"
                stopped.add_note(f"The same command goes on from {shards}.")
            raise
        finally:
            if not kept:
                _remove_with_lock(lock)


def _whole_shards(part: Path, job: Mapping[str, Any] | None) -> set[Path]:
    """Return what may be continued: without a job nothing."""
    return set() if job is None else set(part.glob(SHARD_FILES))


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
    """Lock a file until it is closed, by whatever death of the process.

    Raises:
        BlockingIOError: another process has it, or has just finished and removed it.
    """
    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if os.fstat(opened.fileno()).st_nlink == 0:
        raise BlockingIOError(errno.EWOULDBLOCK, "removed", opened.name)


def _remove_leftovers(target: Path, own: Path) -> None:
    """Remove what killed runs of other jobs have left beside the same target."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{12}\.lock")
    for lock in sorted(target.parent.iterdir()):
        if pattern.fullmatch(lock.name) and lock != own and lock.is_file():
            with contextlib.suppress(OSError), _open_locked(lock, "r+b") as locked:
                if locked.read() == _MARK:
                    _remove_with_lock(lock)


def _remove_with_lock(lock: Path) -> None:
    """Remove a workplace; the lock goes last, for without it nothing finds the rest."""
    try:
        _remove(lock.with_suffix(".part"))
    finally:
        try:
            _remove(lock.with_suffix(".done"))
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make the folders above the target; those that stay empty are removed."""
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _in_one_sentence(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, OpenELMError) as error:
        cause = error.__cause__ if isinstance(error, OpenELMError) else error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OpenELMError(
                f"The disk of {target} is full; nothing was kept. Make room and repeat."
            ) from error
        if isinstance(error, OpenELMError):
            raise
        raise OpenELMError(f"Cannot write {target}: {error}.") from error


# The disk ------------------------------------------------------------------------


def _take_name(staging: Path, target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        staging.rename(target)
        return
    refuse_existing(target, force=force)  # it came while we were writing
    if _exchange(staging, target):
        return  # the old one now has the staging name and is removed by the caller
    # A file system that cannot exchange names: two steps, the old one kept in between.
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
    """Swap two names in one step; False where the system has no such call."""
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
    """Bring a file or a folder's entries onto the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin" and path.is_file():
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a folder or a file, if it is there and can be."""
    try:
        shutil.rmtree(path, ignore_errors=True)
    finally:  # and what a Ctrl-C in the middle of it has left
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
