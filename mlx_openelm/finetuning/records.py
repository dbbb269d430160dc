"""Training data: reads record files, checks them and splits them.

All files are checked before training starts. All errors are reported together, with
file, line and column.
"""

import difflib
import hashlib
import heapq
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.record_formats import RecordChecks, RecordFormats
from mlx_openelm.message_parts import cannot_access
from mlx_openelm.text.parquet_records import PARQUET_SUFFIX, is_parquet, read_rows
from mlx_openelm.text.record_files import (
    RECORD_SUFFIXES,
    JsonValue,
    decompress,
    describe_type,
    read_values,
)
from mlx_openelm.text.templates import Turn

DATA_SUFFIXES = (*RECORD_SUFFIXES, PARQUET_SUFFIX)

_MAX_HELD_OUT = 256  # records: enough to see the loss change, fast to evaluate
_MAX_PROBLEMS_SHOWN, _MAX_CHARACTERS_SHOWN = 20, 1800
_OTHER_NAMES = ("val", "validation", "dev", "eval")
_REPORT_EVERY = 4096  # records

OnProgress = Callable[[int, int, str], None]  # done, total, unit


@dataclass(frozen=True, slots=True)
class Record:
    """One example.

    Attributes:
        place: "train.jsonl:17"; in an array "train.json:17:3", with the column.
        turns: the conversation; a plain text is one assistant turn.
        key: hash of the content, which ignores differences in white space.
        rejected: for preferences, the rejected alternative to the last turn.
    """

    place: str
    turns: tuple[Turn, ...]
    key: bytes
    rejected: str | None = None


@dataclass(frozen=True, slots=True)
class Dataset:
    """The records of one file, or of one split of it.

    Attributes:
        fields: the keys that are read, such as ("question", "answer").
        digest: SHA-256 of the file, in hex.
    """

    path: Path
    format: str
    fields: tuple[str, ...]
    records: tuple[Record, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class Data:
    """The training, validation and test records; `notes` are messages for the user."""

    train: Dataset
    valid: Dataset | None
    test: Dataset | None
    notes: tuple[str, ...]

    @property
    def splits(self) -> dict[str, Dataset]:
        """The present splits, by "train", "valid" and "test"."""
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    @property
    def digest(self) -> str:
        """SHA-256 of all files, in hex."""
        parts = [
            f"{name} {dataset.digest} {len(dataset.records)}\n"
            for name, dataset in self.splits.items()
        ]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def read_data(
    path: Path,
    formats: RecordFormats,
    on_progress: OnProgress = lambda done, total, unit: None,
) -> Data:
    """Read a file, or a folder's train, valid and test files, and check every record.

    Without a validation file, a tenth of the training records (at most 256) is held
    out, chosen by content alone.

    Args:
        on_progress: receives the megabytes that are read of a file.

    Raises:
        OpenELMError: a file is missing or unreadable, or records have errors, which are
            listed for all files.
    """
    files, notes = _find_files(path)
    problems: list[str] = []
    read = {
        split: _read_file(file, formats, problems, on_progress)
        for split, file in files.items()
    }
    if problems:
        raise OpenELMError(_list_problems(problems))
    train, valid = read["train"], read.get("valid")
    if valid is None:
        kept, held_out = hold_out(train.records)
        if held_out:
            notes.append(
                f"There is no validation file, so training holds out {len(held_out)} "
                f"of the {len(train.records)} records of {train.path.name}."
            )
            valid = replace(train, records=held_out)
            train = replace(train, records=kept)
        else:
            notes.append(
                f"There is no validation file, and {train.path.name} has too few "
                "records to hold some out: training runs without validation."
            )
    return Data(train, valid, read.get("test"), tuple(notes))


def hold_out(
    records: tuple[Record, ...],
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Split records into training and validation records.

    Records are chosen by their hash, which depends on content alone; equal records stay
    in the same part.
    """
    groups = Counter(record.key for record in records)
    wanted = min(_MAX_HELD_OUT, max(1, len(records) // 10))
    chosen: set[bytes] = set()
    smallest = list(groups)
    heapq.heapify(smallest)
    while smallest and wanted:
        key = heapq.heappop(smallest)
        if groups[key] <= wanted:
            chosen.add(key)
            wanted -= groups[key]
    if not chosen and len(groups) > 1:  # every group is larger than a tenth
        chosen.add(min(groups, key=lambda key: (groups[key], key)))
    if len(chosen) == len(groups):
        return records, ()
    kept = tuple(record for record in records if record.key not in chosen)
    return kept, tuple(record for record in records if record.key in chosen)


# Finding the files -----------------------------------------------------------------


def _find_files(path: Path) -> tuple[dict[str, Path], list[str]]:
    if path.is_dir():
        return _find_in_folder(path)
    if not path.exists():
        _refuse_missing(path)
    if not is_data_file(path.name):
        raise OpenELMError(
            f"{path} is not a record file; its name must end in "
            f"{', '.join(DATA_SUFFIXES)}. Use one JSON object per line, or a JSON "
            "array."
        )
    return {"train": path}, []


def _find_in_folder(folder: Path) -> tuple[dict[str, Path], list[str]]:
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    files = {}
    for split in ("train", "valid", "test"):
        present = [
            name
            for suffix in DATA_SUFFIXES
            for name in names
            if name.lower() == split + suffix
        ]
        if len(present) > 1:
            raise OpenELMError(
                f"{folder} has both {' and '.join(present)}; keep one of them."
            )
        if present:
            files[split] = folder / present[0]
    similar = [name for name in names if is_data_file(name)]
    if "train" not in files:
        listed = ", ".join(similar[:5]) or "no record file"
        raise OpenELMError(
            f"{folder} has no train.jsonl (or .json, .parquet, .json.gz ...); "
            f"found {listed}. Rename the file, or pass it as `data`."
        )
    other = [name for name in similar if name.partition(".")[0].lower() in _OTHER_NAMES]
    if other and "valid" not in files:
        return files, [
            f"{folder / other[0]} is ignored; name the validation file valid.jsonl."
        ]
    return files, []


def is_data_file(name: str) -> bool:
    """Return whether a file name has a suffix of training data."""
    return name.lower().endswith(DATA_SUFFIXES)


def _refuse_missing(path: Path) -> None:
    parent = path.parent
    names = [file.name for file in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    if not parent.is_dir():
        hint = f"There is no folder {parent} either."
    elif close:
        hint = f"Did you mean {parent / close[0]}?"
    else:
        files = sorted(name for name in names if is_data_file(name))
        where = "This folder" if parent == Path() else f"The folder {parent}"
        hint = f"{where} contains {', '.join(files[:5]) or 'no record file'}."
    raise OpenELMError(
        f"There is no file or folder {path}. {hint} Pass a record file, or a folder "
        "with train.jsonl, as `data`."
    )


# Reading a file ----------------------------------------------------------------


def _read_file(
    path: Path, formats: RecordFormats, problems: list[str], on_progress: OnProgress
) -> Dataset:
    """Read one file; errors in its records are added to `problems`."""
    records = _RecordReader(path, formats, problems)
    try:
        size = path.stat().st_size
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        with path.open("rb") as opened:
            values = (
                read_rows(opened)
                if is_parquet(opened)
                else read_values(decompress(opened))
            )
            for count, read in enumerate(values):
                records.add(read)
                if count % _REPORT_EVERY == 0:
                    on_progress(opened.tell() // 10**6, size // 10**6, "MB")
    except (EOFError, zlib.error) as error:
        raise OpenELMError(
            f"{path} is damaged or truncated: {error}; replace it by a complete file."
        ) from error
    except OSError as error:
        raise OpenELMError(cannot_access(path, error)) from error
    return records.finish(digest)


class _RecordReader:
    """Checks the records of a file, one by one, and converts them.

    The first record in a known format determines that of the file.
    """

    def __init__(self, path: Path, formats: RecordFormats, problems: list[str]) -> None:
        self._path, self._formats, self._problems = path, formats, problems
        self._file_name, self._checks = path.name, RecordChecks()
        self._name, self._place = "", ""  # of the format; of its first record
        self._unknown: list[tuple[str, dict[str, Any]]] = []  # before that record
        self._other_formats: set[str] = set()
        self._records: list[Record] = []
        self._is_empty = True

    def add(self, read: JsonValue) -> None:
        """Add the next value of the file."""
        self._is_empty = False
        record, problem = read.value, read.problem
        if problem or not isinstance(record, dict):
            problem = problem or f"is {describe_type(record)}, not an object"
            self._problems.append(f"{self._path}:{read.place} {problem}")
            return
        name = self._formats.find(record)
        if name and not self._name:
            self._name, self._place = name, read.place
            for place, earlier in self._unknown:
                self._report_missing(place, earlier)
        if not self._name:
            self._unknown.append((read.place, record))
        elif name == self._name:
            self._convert(read.place, record)
        elif not name:
            self._report_missing(read.place, record)
        elif name not in self._other_formats:  # one problem per format, not per record
            self._other_formats.add(name)
            self._problems.append(
                f"{self._path}:{read.place} is {name} while {self._path.name}:"
                f"{self._place} is {self._name}; use one file per format"
            )

    def finish(self, digest: str) -> Dataset:
        """Return the records of the file, whose SHA-256 is `digest`."""
        if self._is_empty:
            raise OpenELMError(f"{self._path} has no records; it is empty.")
        if self._name:
            fields = self._formats.known[self._name].fields
        else:
            fields = ()
            if self._unknown:
                place = self._unknown[0][0]
                unknown = self._formats.describe_unknown([r for _, r in self._unknown])
                self._problems.append(f"{self._path}:{place} {unknown}")
        return Dataset(self._path, self._name, fields, tuple(self._records), digest)

    def _report_missing(self, place: str, record: dict[str, Any]) -> None:
        fields = self._formats.known[self._name].fields
        missing = [key for key in fields if record.get(key) is None]
        self._problems.append(
            f"{self._path}:{place} has no {' and no '.join(missing)}, as {self._name} "
            "needs"
        )

    def _convert(self, place: str, record: dict[str, Any]) -> None:
        format = self._formats.known[self._name]
        problems = self._checks.problems
        turns = format.read(record, self._checks)
        if problems:
            self._problems += [f"{self._path}:{place}: {p}" for p in problems]
            problems.clear()
            return
        rejected = format.rejected(record)
        key = _make_key(turns, rejected)
        self._records.append(Record(f"{self._file_name}:{place}", turns, key, rejected))


def _make_key(turns: tuple[Turn, ...], rejected: str | None) -> bytes:
    parts: list[str] = []
    for turn in turns:
        input = turn.input and " ".join(turn.input.split())
        parts += (turn.role, " ".join(turn.text.split()), input)
    parts.append(" ".join(rejected.split()) if rejected else "")
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()


def _list_problems(problems: list[str]) -> str:
    shown = problems[:_MAX_PROBLEMS_SHOWN]
    while len(shown) > 1 and len("; ".join(shown)) > _MAX_CHARACTERS_SHOWN:
        shown.pop()
    more = len(problems) - len(shown)
    rest = f"; and {more} more" if more > 0 else ""
    count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
    return f"The data has {count}: {'; '.join(shown)}{rest}."
