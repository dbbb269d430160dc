"""Training data: reads record files, checks them and splits them.

All files are checked before training starts. All errors are reported together, with
file, line and column.
"""

import difflib
import hashlib
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.record_formats import RecordChecks, RecordFormats
from mlx_openelm.message_parts import describe_error
from mlx_openelm.text.record_files import describe_type, open_records, read_values
from mlx_openelm.text.templates import Turn

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_MAX_HELD_OUT = 256  # records: enough to see the loss change, fast to evaluate
_MAX_PROBLEMS_SHOWN = 20
_OTHER_NAMES = ("val", "validation", "dev", "eval")


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


def read_data(path: Path, formats: RecordFormats) -> Data:
    """Read a file, or a folder's train, valid and test files, and check every record.

    Without a validation file, a tenth of the training records (at most 256) is held
    out, chosen by content alone.

    Raises:
        OpenELMError: a file is missing or unreadable, or records have errors, which are
            listed for all files.
    """
    files, notes = _find_files(path)
    problems: list[str] = []
    read = {split: _read_file(file, formats, problems) for split, file in files.items()}
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
    groups: dict[bytes, int] = {}
    for record in records:
        groups[record.key] = groups.get(record.key, 0) + 1
    wanted = min(_MAX_HELD_OUT, max(1, len(records) // 10))
    chosen: set[bytes] = set()
    for key in sorted(groups):
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
    if not path.name.endswith(SUFFIXES):
        raise OpenELMError(
            f"{path} is not a record file; its name must end in {', '.join(SUFFIXES)}. "
            "Use one JSON object per line, or a JSON array."
        )
    return {"train": path}, []


def _find_in_folder(folder: Path) -> tuple[dict[str, Path], list[str]]:
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    files = {}
    for split in ("train", "valid", "test"):
        present = [split + suffix for suffix in SUFFIXES if split + suffix in names]
        if len(present) > 1:
            raise OpenELMError(
                f"{folder} has both {' and '.join(present)}; keep one of them."
            )
        if present:
            files[split] = folder / present[0]
    similar = [name for name in names if name.endswith(SUFFIXES)]
    if "train" not in files:
        listed = ", ".join(similar[:5]) or "no record file"
        raise OpenELMError(
            f"{folder} has no train.jsonl (or train.json, or .gz of these); "
            f"found {listed}. Rename the file, or pass it as `data`."
        )
    other = [name for name in similar if name.partition(".")[0].lower() in _OTHER_NAMES]
    if other and "valid" not in files:
        return files, [
            f"{folder / other[0]} is ignored; name the validation file valid.jsonl."
        ]
    return files, []


def _refuse_missing(path: Path) -> None:
    parent = path.parent
    names = [file.name for file in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    if not parent.is_dir():
        hint = f"There is no folder {parent} either."
    elif close:
        hint = f"Did you mean {parent / close[0]}?"
    else:
        files = sorted(name for name in names if name.endswith(SUFFIXES))
        hint = f"{parent} contains {', '.join(files[:5]) or 'no record file'}."
    raise OpenELMError(
        f"There is no file or folder {path}. {hint} Pass a record file, or a folder "
        "with train.jsonl, as `data`."
    )


# Reading a file ----------------------------------------------------------------


def _read_file(path: Path, formats: RecordFormats, problems: list[str]) -> Dataset:
    """Read one file; errors in its records are added to `problems`."""
    try:
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        with open_records(path) as lines:
            objects = _read_objects(path, lines, problems)
    except (EOFError, zlib.error) as error:
        raise OpenELMError(
            f"{path} is damaged or truncated: {error}; replace it by a complete file."
        ) from error
    except OSError as error:
        raise OpenELMError(f"Cannot read {path}: {describe_error(error)}.") from error
    if not objects and not problems:
        raise OpenELMError(f"{path} has no records; it is empty.")
    names = [formats.find(record) for _, record in objects]
    name, first = next(((n, i) for i, n in enumerate(names) if n), ("", 0))
    if not name:
        if objects:
            unknown = formats.describe_unknown([record for _, record in objects])
            problems.append(f"{path}:{objects[0][0]} {unknown}")
        return Dataset(path, "", (), (), digest)
    format = formats.known[name]
    records, other_formats = [], set()
    for (place, record), other in zip(objects, names, strict=True):
        if not other:
            missing = [key for key in format.fields if record.get(key) is None]
            problems.append(
                f"{path}:{place} has no {' and no '.join(missing)}, as {name} needs"
            )
        elif other != name:
            if other not in other_formats:  # one problem per format, not per record
                problems.append(
                    f"{path}:{place} is {other} while {path.name}:{objects[first][0]} "
                    f"is {name}; use one file per format"
                )
            other_formats.add(other)
        else:
            checks = RecordChecks()
            turns = format.read(record, checks)
            problems += [f"{path}:{place}: {problem}" for problem in checks.problems]
            if not checks.problems:
                rejected = format.rejected(record)
                key = _make_key(turns, rejected)
                records.append(Record(f"{path.name}:{place}", turns, key, rejected))
    return Dataset(path, name, format.fields, tuple(records), digest)


def _read_objects(
    path: Path, file: IO[bytes], problems: list[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Return the place and the value of each JSON object."""
    objects = []
    for read in read_values(file):
        value, problem = read.value, read.problem
        if problem or not isinstance(value, dict):
            problem = problem or f"is {describe_type(value)}, not an object"
            problems.append(f"{path}:{read.place} {problem}")
        else:
            objects.append((read.place, value))
    return objects


def _make_key(turns: tuple[Turn, ...], rejected: str | None) -> bytes:
    parts = [part for turn in turns for part in (turn.role, turn.text, turn.input)]
    joined = "\0".join(" ".join(part.split()) for part in [*parts, rejected or ""])
    return hashlib.blake2b(joined.encode(), digest_size=16).digest()


def _list_problems(problems: list[str]) -> str:
    shown = "; ".join(problems[:_MAX_PROBLEMS_SHOWN])
    more = len(problems) - _MAX_PROBLEMS_SHOWN
    rest = f"; and {more} more" if more > 0 else ""
    count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
    return f"The data has {count}: {shown}{rest}."
