"""A folder is written whole or not at all.

It grows in a hidden sibling, is flushed to the disk and takes its name at the end, so a
reader never sees half of it and a crash leaves the old one or the new one.
"""

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlx_openelm.errors import OpenELMError


@contextlib.contextmanager
def staged_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder to write in; it becomes `target` if the block succeeds.

    Raises:
        OpenELMError: the target exists and `force` is off, or the disk refuses.
    """
    refuse_existing(target, force=force)
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(
            tempfile.mkdtemp(
                prefix=f".{target.name}.", suffix=".part", dir=target.parent
            )
        )
    except OSError as error:
        _remove_empty(made)
        raise OpenELMError(f"Cannot write beside {target}: {error}.") from error
    try:
        staging.chmod(0o777 & ~_umask())
        yield staging
        for path in (*staging.rglob("*"), staging):
            _flush(path)
        _take_name(staging, target, force)
        _flush(target.parent)
    except (OSError, OpenELMError) as error:
        cause = error.__cause__ if isinstance(error, OpenELMError) else error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OpenELMError(
                f"The disk of {target} is full; nothing was kept. Make room and repeat."
            ) from error
        if isinstance(error, OpenELMError):
            raise
        raise OpenELMError(f"Cannot write {target}: {error}.") from error
    finally:
        try:
            _remove(staging)
        finally:
            _remove_empty(made)


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise if something is at `target` that must not be replaced.

    `force` replaces a folder that holds a model or an adapter and nothing else, or
    nothing at all: a slip of the pen must not cost what a person has made.
    """
    if not os.path.lexists(target):
        return
    if not force:
        raise OpenELMError(
            f"{target} exists already; choose another place, or say --force to replace "
            "it."
        )
    foreign = _describe_foreign(target)
    if foreign:
        raise OpenELMError(
            f"{target} {foreign}, so --force does not replace it; choose another place "
            "or remove it yourself."
        )


_MODEL_SUFFIXES = (".json", ".jsonl", ".safetensors", ".model", ".md", ".jinja")
_CLUTTER = (".DS_Store", ".gitattributes")  # nobody's work


def _describe_foreign(target: Path) -> str:
    """Say why something is more, or other, than a model or an adapter; else nothing."""
    if target.is_symlink() or not target.is_dir():
        return "is not a model or adapter folder"
    found = sorted(path for path in target.iterdir() if path.name not in _CLUTTER)
    names = {path.name for path in found}
    described = bool(names & {"config.json", "adapter_config.json"})
    if found and not (described and any(n.endswith(".safetensors") for n in names)):
        return "is not a model or adapter folder"
    for path in found:
        if path.suffix not in _MODEL_SUFFIXES or not path.is_file():
            return f"holds {path.name}, which is no part of a model"
    return ""


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


def _flush(path: Path) -> None:
    """Bring a file or a folder's entries onto the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin" and path.is_file():
            import fcntl

            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path, ignore_errors=True)
    finally:  # and what a Ctrl-C in the middle of it has left
        shutil.rmtree(path, ignore_errors=True)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove the folders, innermost first, as long as nothing is in them."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
