"""Readers of text and JSON files: limits of size and depth, and no byte order mark."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

BOM = b"\xef\xbb\xbf"  # of UTF-8, as Windows writes it
MAX_DEPTH = 100  # nested lists and objects of JSON
MAX_BYTES = 1 << 27  # of a text, or of a JSON document such as tokenizer.json
MAX_RECORD_BYTES = 1 << 25  # of a prompt, or one record of many
_PART_BYTES = 1 << 16
TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"
UTF16 = "is not UTF-8 but UTF-16; save it as UTF-8"
_LFS_POINTER = (
    "is a Git LFS pointer, not the file itself; run git lfs pull in its folder, or "
    "download the file again"
)
_WEB_PAGE = (
    "is a web page, not the file itself; download the file, not the page that "
    "describes it"
)
# First bytes in lower case -> why a file is not what it should be
PLACEHOLDERS = {
    b"version https://git-lfs": _LFS_POINTER,
    b"<!doctype html": _WEB_PAGE,
    b"<html": _WEB_PAGE,
}
_PARQUET = (
    "is a Parquet file, not text; save its rows as JSON lines, or its texts as UTF-8 "
    "(lora, and pretrain with the suffix .parquet, read it as it is)"
)
NOT_TEXT = {  # a web page is one
    b"par1\x15": _PARQUET,  # its magic, and the type of the first field of a page
    b"\xff\xfe": UTF16,
    b"\xfe\xff": UTF16,
    b"version https://git-lfs": _LFS_POINTER,
}
NOT_JSON = {**PLACEHOLDERS, **NOT_TEXT, b"{\0": UTF16, b"\0{": UTF16}
_DECODER = json.JSONDecoder()


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON or not UTF-8, has a number with too many digits, or
            is nested more than `MAX_DEPTH` levels deep.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        value = _decode(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        check_depth(value)
    return value


def _decode(text: str) -> Any:
    try:
        value, end = _DECODER.raw_decode(text)  # half the time of json.loads
    except json.JSONDecodeError:
        end = -1  # it can start with a space
    return value if end == len(text) else json.loads(text)


def check_depth(value: Any) -> None:
    """Raise ValueError if a value is nested more than `MAX_DEPTH` levels deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        # By identity: an alias in YAML can repeat a list, or contain itself.
        inner = {
            id(child): child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        }
        if not inner:
            return
        level = list(inner.values())
    raise ValueError(TOO_DEEP)


def find_unpaired_surrogate(text: str) -> str:
    r"""Return the first unpaired surrogate, as "\ud83d"; empty if there is none."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return ascii(text[error.start])[1:-1]
    return ""


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: see `parse_json` and `read_text`.
    """
    return parse_json(read_text(path, NOT_JSON))


def describe_start(data: bytes, starts: Mapping[bytes, str]) -> str:
    """Return the reason in `starts` for the first bytes of a file; "" if none."""
    data = data[:64].lower()
    return next((kind for start, kind in starts.items() if data.startswith(start)), "")


def read_text(path: Path, refused: Mapping[bytes, str] = NOT_TEXT) -> str:
    """Return the text of a UTF-8 file, with its line ends.

    Args:
        refused: first bytes, and what a file is that starts with them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, refused, or larger than `MAX_BYTES`.
    """
    with path.open("rb") as opened:
        return read_text_of(opened, MAX_BYTES, refused)


def read_text_of(
    file: IO[bytes], limit: int, refused: Mapping[bytes, str] = NOT_TEXT
) -> str:
    """Return the rest of an open file of at most `limit` bytes; see `read_text`."""
    parts, size = list[bytes](), 0
    while part := file.read(_PART_BYTES):  # read(n) reserves n bytes
        if not parts and (problem := describe_start(part, refused)):
            raise ValueError(f"it {problem}")
        parts.append(part)
        size += len(part)
        if size > limit:
            raise ValueError(f"it is larger than {limit >> 20} MiB")
    return b"".join(parts).decode("utf-8-sig")


def open_text(file: IO[bytes], *, newline: str | None = None) -> io.TextIOWrapper:
    """Return a reader of UTF-8 text, of which not all is read at once.

    Args:
        newline: as of `open`.

    Raises:
        ValueError: `file`, a buffered reader, starts as no text does; see `NOT_TEXT`.
    """
    buffered: Any = file
    if problem := describe_start(buffered.peek(64), NOT_TEXT):
        raise ValueError(f"it {problem}")
    return io.TextIOWrapper(buffered, encoding="utf-8-sig", newline=newline)
