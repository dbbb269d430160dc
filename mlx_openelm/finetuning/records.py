"""Training data: reads files of records, checks them and splits them.

All files are read and checked before training starts: every error is reported at once,
with file, line and column.
"""

import difflib
import hashlib
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.record_formats import RecordChecks, RecordFormats
from mlx_openelm.text.record_files import describe_type, open_records, read_values
from mlx_openelm.text.templates import Turn

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_MOST_SET_ASIDE = 256  # records: enough to see a loss move, quick to evaluate
_MOST_SHOWN = 20  # problems
_OTHER_NAMES = ("val", "validation", "dev", "eval")


@dataclass(frozen=True, slots=True)
class Record:
    """One example.

    Attributes:
        place: "train.jsonl:17"; in an array "train.json:17:3", with the column.
        turns: the conversation; a plain text is one assistant's turn.
        key: equal in records that differ in nothing but white space.
        rejected: of a preference, the answer that is worse than the last turn.
    """

    place: str
    turns: tuple[Turn, ...]
    key: bytes
    rejected: str | None = None


@dataclass(frozen=True, slots=True)
class Dataset:
    """The records of one file, or the part of them that is set aside.

    Attributes:
        fields: the keys that were read, as ("question", "answer").
        digest: sha256 of the file's bytes, in hex.
    """

    path: Path
    format: str
    fields: tuple[str, ...]
    records: tuple[Record, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class Data:
    """What is trained on and what is held against it; `notes` are sentences."""

    train: Dataset
    valid: Dataset | None
    test: Dataset | None
    notes: tuple[str, ...]

    @property
    def splits(self) -> dict[str, Dataset]:
        """The files that there are, by "train", "valid" and "test"."""
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: found for name, found in splits.items() if found is not None}

    @property
    def digest(self) -> str:
        """Sha256 in hex of all files' bytes: other data has another one."""
        parts = [
            f"{name} {dataset.digest} {len(dataset.records)}\n"
            for name, dataset in self.splits.items()
        ]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def read_data(path: Path, formats: RecordFormats) -> Data:
    """Read a file, or a folder's train, valid and test files, and check every record.

    Without a valid file, a tenth of the training records (at most 256) is set aside,
    chosen by their content alone.

    Raises:
        OpenELMError: a file is missing or cannot be read, or records are wrong; all
            problems of all files are in it.
    """
    files, notes = _find_files(path)
    problems: list[str] = []
    read = {split: _read_file(file, formats, problems) for split, file in files.items()}
    if problems:
        raise OpenELMError(_list_problems(problems))
    train, valid = read["train"], read.get("valid")
    if valid is None:
        kept, aside = set_aside(train.records)
        if aside:
            notes.append(
                f"There is no validation file, so {len(aside)} of the "
                f"{len(train.records)} records of {train.path.name} are set aside."
            )
            valid = replace(train, records=aside)
            train = replace(train, records=kept)
        else:
            notes.append(
                "There is no validation file, and nothing to set aside from "
                f"{train.path.name}: training goes without validation."
            )
    return Data(train, valid, read.get("test"), tuple(notes))


def set_aside(
    records: tuple[Record, ...],
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Split records into those to train on and those to validate with.

    The order of hashes chooses: it depends on the content and on nothing else, and
    equal records stay together.
    """
    groups: dict[bytes, int] = {}
    for record in records:
        groups[record.key] = groups.get(record.key, 0) + 1
    wanted = min(_MOST_SET_ASIDE, max(1, len(records) // 10))
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


# Which files ---------------------------------------------------------------------


def _find_files(path: Path) -> tuple[dict[str, Path], list[str]]:
    if path.is_dir():
        return _find_in_folder(path)
    if not path.exists():
        _refuse_missing(path)
    if not path.name.endswith(SUFFIXES):
        raise OpenELMError(
            f"{path} is no file of records, which ends in {', '.join(SUFFIXES)}; give "
            "one JSON object a line, or a JSON array."
        )
    return {"train": path}, []


def _find_in_folder(folder: Path) -> tuple[dict[str, Path], list[str]]:
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    files = {}
    for split in ("train", "valid", "test"):
        there = [split + suffix for suffix in SUFFIXES if split + suffix in names]
        if len(there) > 1:
            raise OpenELMError(
                f"{folder} holds {' and '.join(there)}; keep one of them, so that it "
                "is clear which is meant."
            )
        if there:
            files[split] = folder / there[0]
    similar = [name for name in names if name.endswith(SUFFIXES)]
    if "train" not in files:
        holds = f"holds {', '.join(similar[:5])}" if similar else "holds no such file"
        raise OpenELMError(
            f"{folder} has no train.jsonl (nor train.json, nor either with .gz); it "
            f"{holds}. Rename the file, or give it as `data` itself."
        )
    other = [name for name in similar if name.partition(".")[0].lower() in _OTHER_NAMES]
    if other and "valid" not in files:
        return files, [
            f"{folder / other[0]} is not read: a validation file is valid.jsonl."
        ]
    return files, []


def _refuse_missing(path: Path) -> None:
    parent = path.parent
    there = [file.name for file in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, there, n=1)
    if not parent.is_dir():
        similar = f"nor a folder {parent}"
    elif close:
        similar = f"but there is {parent / close[0]}"
    else:
        found = sorted(name for name in there if name.endswith(SUFFIXES))
        listed = ", ".join(found[:5]) or "no file of records"
        similar = f"and {parent} holds {listed}"
    raise OpenELMError(
        f"There is no file or folder {path}, {similar}; give a file of records, or a "
        "folder with train.jsonl, as `data`."
    )


# Reading a file ----------------------------------------------------------------


def _read_file(path: Path, formats: RecordFormats, problems: list[str]) -> Dataset:
    """Read one file; what is wrong with its records is added to `problems`."""
    try:
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        with open_records(path) as lines:
            found = _read_objects(path, lines, problems)
    except (EOFError, zlib.error) as error:
        raise OpenELMError(
            f"{path} is damaged or cut off: {error}; get it anew."
        ) from error
    except OSError as error:
        raise OpenELMError(f"Cannot read {path}: {error}.") from error
    if not found and not problems:
        raise OpenELMError(f"{path} holds no records; it is empty.")
    named = [formats.find(record) for _, record in found]
    name, first = next(((n, i) for i, n in enumerate(named) if n), ("", 0))
    if not name:
        if found:
            problems.append(f"{path}:{found[0][0]} {formats.describe_unknown(found)}")
        return Dataset(path, "", (), (), digest)
    known = formats.known[name]
    records, mixed = [], set()
    for (place, record), other in zip(found, named, strict=True):
        if not other:
            missing = [k for k in known.fields if record.get(k) is None]
            problems.append(
                f"{path}:{place} has no {' and no '.join(missing)}, as {name} needs"
            )
        elif other != name:
            if other not in mixed:  # named once, or it would be half of the file
                problems.append(
                    f"{path}:{place} is {other} while {path.name}:{found[first][0]} is "
                    f"{name}; give each format a file of its own"
                )
            mixed.add(other)
        else:
            checks = RecordChecks()
            turns = known.read(record, checks)
            problems += [f"{path}:{place}: {problem}" for problem in checks.problems]
            if not checks.problems:
                rejected = known.rejected(record)
                key = _make_key(turns, rejected)
                records.append(Record(f"{path.name}:{place}", turns, key, rejected))
    return Dataset(path, name, known.fields, tuple(records), digest)


def _read_objects(
    path: Path, file: IO[bytes], problems: list[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Return the place and the object of every record."""
    found = []
    for read in read_values(file):
        value, problem = read.value, read.problem
        if problem or not isinstance(value, dict):
            problem = problem or f"is {describe_type(value)}, not an object"
            problems.append(f"{path}:{read.place} {problem}")
        else:
            found.append((read.place, value))
    return found


def _make_key(turns: tuple[Turn, ...], rejected: str | None) -> bytes:
    parts = [part for turn in turns for part in (turn.role, turn.text, turn.input)]
    joined = "\0".join(" ".join(part.split()) for part in [*parts, rejected or ""])
    return hashlib.blake2b(joined.encode(), digest_size=16).digest()


def _list_problems(problems: list[str]) -> str:
    shown = "; ".join(problems[:_MOST_SHOWN])
    more = len(problems) - _MOST_SHOWN
    rest = f"; and {more} more" if more > 0 else ""
    count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
    return f"The data has {count}: {shown}{rest}."
