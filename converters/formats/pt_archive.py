"""Locate the records in the zip archives of torch.save, in a memory-mapped file."""

import mmap
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import describe_error

Array = np.ndarray[Any, np.dtype[Any]]

_OTHER_FILES = {  # first bytes -> what the file is, and what to do
    b"PK\x03\x04": "is a truncated zip; copy or download it again",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19": "has the format of torch before 1.6; "
    "load it with a current torch and save it again",
    b"version https://git-lfs": "is a Git LFS pointer; run git lfs pull",
}


@dataclass(frozen=True, slots=True)
class PtArchive:
    """A memory-mapped file and the positions of its records.

    Attributes:
        data: the bytes of the whole file.
        records: name without "NAME/" -> start and length in bytes.
    """

    path: Path
    data: Array
    records: dict[str, tuple[int, int]]

    def damaged(self, why: str) -> OpenELMError:
        return OpenELMError(
            f"{self.path} is damaged: {why}; copy or download it again."
        )


def open_archive(path: Path) -> PtArchive:
    """Map a file and locate its records.

    Raises:
        OpenELMError: the file cannot be read, is damaged, or is not from torch.save.
    """
    head = b""
    try:
        if not path.is_file():  # opening a pipe would block
            kind = "a folder" if path.is_dir() else "missing or not a file"
            raise OpenELMError(f"{path} is {kind}; pass a .pt or .bin file.")
        with path.open("rb") as file:
            head = file.read(64)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with zipfile.ZipFile(file) as zipped:
                entries = zipped.infolist()
    except OSError as error:
        raise OpenELMError(f"Cannot read {path}: {describe_error(error)}.") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        begins = f"begins with {head[:12]!r}" if head else "is empty"
        unknown = f"is not a file of torch.save: it {begins}; pass a .pt or .bin file"
        kinds = (kind for start, kind in _OTHER_FILES.items() if head.startswith(start))
        raise OpenELMError(f"{path} {next(kinds, unknown)}.") from error
    archive = PtArchive(path, np.frombuffer(mapped, np.uint8), {})
    names = [entry.filename for entry in entries]
    root = names[0].partition("/")[0] if names else ""
    if f"{root}/data.pkl" not in names:
        raise OpenELMError(
            f"{path} is a zip, but not of torch.save: it has no data.pkl, only "
            f"{list_names(names)}; pass a .pt or .bin file."
        )
    for entry in entries:
        folder, _, name = entry.filename.partition("/")
        if folder != root or name in archive.records:
            raise archive.damaged(
                f"record {list_names([entry.filename])} is duplicated or misplaced"
            )
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise OpenELMError(
                f"{path} is compressed or encrypted, which torch.save never does; load "
                "it with torch and save it again."
            )
        archive.records[name] = _locate(archive, entry)
    start, length = archive.records.get("byteorder", (0, 0))
    if archive.data[start : start + min(length, 8)].tobytes() == b"big":
        raise OpenELMError(
            f"{path} was saved on a big-endian machine, which is not supported; load "
            "it with torch there and save it as safetensors."
        )
    return archive


def _locate(archive: PtArchive, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Return the start and length of a record."""
    at, size = entry.header_offset, archive.data.size
    if 0 <= at <= size - 30:
        # Only the local header has the lengths of the name and of torch's padding.
        header = archive.data[at : at + 30].tobytes()
        name_length, extra_length = struct.unpack("<HH", header[26:])
        start = at + 30 + name_length + extra_length
        name = archive.data[at + 30 : at + 30 + name_length].tobytes()
        extra = archive.data[start - extra_length : start].tobytes()
        proper = (
            header.startswith(b"PK\x03\x04")
            and name == entry.orig_filename.encode(_encoding(entry), "replace")
            and _is_extra(extra)
            and start + entry.file_size <= size
        )
        if proper:
            return start, entry.file_size
    raise archive.damaged(
        f"{list_names([entry.filename])} is not where the zip's directory places it"
    )


def _encoding(entry: zipfile.ZipInfo) -> str:
    """Return the encoding of a record's name."""
    return "utf-8" if entry.flag_bits & 0x800 else "cp437"


def _is_extra(extra: bytes) -> bool:
    """Whether an extra field is a sequence of kind, length and data."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 0 or length > len(extra) - 4:
            return False
        extra = extra[4 + length :]
    return not extra


def list_names(names: Iterable[object]) -> str:
    """Return names for an error message: escaped, shortened, at most six."""
    shown = [ascii(name)[:100] for name in names]
    more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
    return (", ".join(shown[:6]) or "nothing") + more
