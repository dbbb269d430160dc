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
from collections.abc import Iterator
from pathlib import Path

from mlx_openelm.errors import OpenELMError


@contextlib.contextmanager
def staged_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder to write in; it becomes `target` if the block succeeds.

    Raises:
        OpenELMError: the target exists and `force` is off, or the disk refuses.
    """
    refuse_existing(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        )
    except OSError as error:
        raise OpenELMError(f"Cannot write beside {target}: {error}.") from error
    try:
        staging.chmod(0o777 & ~_umask())
        yield staging
        for path in (*staging.rglob("*"), staging):
            _flush(path)
        _take_name(staging, target, force)
        _flush(target.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OpenELMError(
                f"The disk of {target} is full; nothing was kept. Make room and repeat."
            ) from error
        raise OpenELMError(f"Cannot write {target}: {error}.") from error
    finally:
        _remove(staging)


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise if something is at `target` that must not be replaced.

    `force` replaces what looks like a model or an adapter, or is empty, and no more: a
    slip of the pen must not cost a person's home folder.
    """
    if not os.path.lexists(target):
        return
    if not force:
        raise OpenELMError(
            f"{target} exists already; choose another place, or say --force to replace "
            "it."
        )
    ours = any((target / n).exists() for n in ("config.json", "adapter_config.json"))
    if target.is_symlink() or not target.is_dir() or not (ours or _is_empty(target)):
        raise OpenELMError(
            f"{target} is not a model or adapter folder, so --force does not replace it; "
            "choose another place or remove it yourself."
        )


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
    staging.rename(target)
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
    return failed == 0


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
    shutil.rmtree(path, ignore_errors=True)


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
