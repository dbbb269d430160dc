"""Locate and read the records in the zip archives of torch.save.

The zip stores a CRC-32 of every record. It is compared when the first part of a record
is read.
"""

import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import cannot_access, list_names
from mlx_openelm.storage.weight_reader import Bytes, WeightFile

_BLOCK = 2**24  # bytes of a record that are checked at a time

_OTHER_FILES = {  # first bytes -> what the file is, and what to do
    b"PK\x03\x04": "is a truncated zip; copy or download it again",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19": "has the format of torch before 1.6; "
    "load it with a current torch and save it again",
}


@dataclass(frozen=True, slots=True)
class Record:
    """Position of a record in bytes, and its CRC-32 (0: torch did not compute it)."""

    start: int
    length: int
    crc: int


@dataclass(frozen=True, slots=True)
class PtArchive:
    """A file and its records.

    Attributes:
        records: by their names without "NAME/".
        checked: the names of records whose CRC-32 was compared.
    """

    file: WeightFile
    records: dict[str, Record]
    checked: set[str] = field(default_factory=set)

    @property
    def path(self) -> Path:
        return self.file.path

    def read(self, name: str, start: int = 0, length: int | None = None) -> Bytes:
        """Return bytes of a record, default all.

        Raises:
            OpenELMError: the file has changed, or the record does not match its CRC-32.
        """
        record = self.records[name]
        length = record.length if length is None else length
        content = self.file.read(record.start + start, length)
        if record.crc and name not in self.checked:
            crc = 0
            if length == record.length:
                crc = zlib.crc32(content.data)
            else:
                for at in range(0, record.length, _BLOCK):
                    block = min(_BLOCK, record.length - at)
                    crc = zlib.crc32(self.file.read(record.start + at, block).data, crc)
            if crc != record.crc:
                raise self.damaged(
                    f"record {list_names([name])} does not match its checksum"
                )
        self.checked.add(name)
        return content

    def damaged(self, why: str) -> OpenELMError:
        return OpenELMError(
            f"{self.path} is damaged: {why}; copy or download it again."
        )


def open_archive(path: Path) -> PtArchive:
    """Open a file and locate its records.

    Raises:
        OpenELMError: the file cannot be read, is damaged, or is not from torch.save.
    """
    head = b""
    try:
        archive = PtArchive(WeightFile.open(path), {})
        with path.open("rb") as file:
            head = file.read(64)
            with zipfile.ZipFile(file) as zipped:
                entries = zipped.infolist()
            _add_records(archive, file, entries)
    except OSError as error:
        raise OpenELMError(cannot_access(path, error)) from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        begins = f"begins with {head[:12]!r}" if head else "is empty"
        unknown = f"is not a file of torch.save: it {begins}; pass a .pt or .bin file"
        kinds = (kind for start, kind in _OTHER_FILES.items() if head.startswith(start))
        raise OpenELMError(f"{path} {next(kinds, unknown)}.") from error
    order = archive.records.get("byteorder")
    if order and archive.read("byteorder", 0, min(order.length, 8)).tobytes() == b"big":
        raise OpenELMError(
            f"{path} was saved on a big-endian machine, which is not supported; load "
            "it with torch there and save it as safetensors."
        )
    return archive


def _add_records(
    archive: PtArchive, file: BinaryIO, entries: list[zipfile.ZipInfo]
) -> None:
    path, names = archive.path, [entry.filename for entry in entries]
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
        archive.records[name] = _locate(archive, file, entry)


def _locate(archive: PtArchive, file: BinaryIO, entry: zipfile.ZipInfo) -> Record:
    at, size = entry.header_offset, archive.file.size
    if 0 <= at <= size - 30:
        # Only the local header has the lengths of the name and of torch's padding.
        file.seek(at)
        header = file.read(30)
        name_length, extra_length = struct.unpack("<HH", header[26:])
        start = at + 30 + name_length + extra_length
        name, extra = file.read(name_length), file.read(extra_length)
        proper = (
            header.startswith(b"PK\x03\x04")
            and name == entry.orig_filename.encode(_encoding(entry), "replace")
            and _is_extra(extra)
            and start + entry.file_size <= size
        )
        if proper:
            return Record(start, entry.file_size, entry.CRC)
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
