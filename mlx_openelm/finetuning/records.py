"""Files of training data become checked records.

Nothing is trained before everything is read: all that is wrong with the files is said
at once, with file, line and column.
"""

import difflib
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.tokenizer import Turn

TEXT = "text"
COMPLETION = "prompt+completion"
MESSAGES = "messages"
ALPACA = "alpaca"
PREFERENCES = "preferences"  # prompt, chosen and rejected as texts
PREFERENCE_MESSAGES = "preferences in messages"

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
ROLES = ("system", "user", "assistant")

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
    def digest(self) -> str:
        """Sha256 in hex of all files' bytes: other data has another one."""
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        parts = [
            f"{name} {dataset.digest} {len(dataset.records)}\n"
            for name, dataset in splits.items()
            if dataset is not None
        ]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def read_data(
    path: Path,
    *,
    objective: str = "sft",
    prompt_key: str | None = None,
    completion_key: str | None = None,
) -> Data:
    """Read a file, or a folder's train, valid and test files, and check every record.

    Without a valid file, a tenth of the training records (at most 256) is set aside,
    chosen by their content alone.

    Args:
        objective: "dpo" reads preferences, anything else the other formats.
        prompt_key, completion_key: names of the two fields, for `COMPLETION` alone.

    Raises:
        OpenELMError: a file is missing or cannot be read, or records are wrong; all
            problems of all files are in it.
    """
    files, notes = _find_files(path)
    formats = _known_formats(objective, prompt_key, completion_key)
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
            f"{holds}. Rename the file, or give it as --data itself."
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
        "folder with train.jsonl, as --data."
    )


# A file --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Format:
    """How records of one kind are known, by their fields, and read."""

    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any], "_Checks"], tuple[Turn, ...]]
    rejected: bool = False


@dataclass(slots=True)
class _Checks:
    """Collects what is wrong with one record."""

    problems: list[str] = field(default_factory=list)

    def text(self, value: Any, key: str, *, answer: bool = False) -> str:
        """Return `value` if it is a text that can be tokenized."""
        if not isinstance(value, str):
            self.problems.append(f"{key} is {_kind(value)}, not a text")
            return ""
        if answer and not value.strip():
            self.problems.append(f"{key} is empty: there is no answer to learn")
        if "\0" in value:
            self.problems.append(f"{key} holds a NUL character")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = value[error.start].encode(errors="backslashreplace").decode()
                self.problems.append(f"{key} holds {half}, half of a character")
        return value

    def messages(self, value: Any, key: str) -> tuple[Turn, ...]:
        """Return a list of {role, content} as turns."""
        if not isinstance(value, list) or not value:
            what = "an empty list" if value == [] else _kind(value)
            self.problems.append(f"{key} is {what}, not a list of messages")
            return ()
        turns = []
        for i, message in enumerate(value):
            here = f"{key}[{i}]"
            if not isinstance(message, dict):
                self.problems.append(f"{here} is {_kind(message)}, not a message")
                continue
            role = message.get("role")
            if role not in ROLES:
                self.problems.append(
                    f"{here}.role is {role!r}, not system, user or assistant"
                )
            elif role == "system" and i:
                self.problems.append(f"{here} is a system message, but not the first")
            text = self.text(
                message.get("content"), f"{here}.content", answer=role == "assistant"
            )
            turns.append(Turn(str(role), text))
        if not self.problems and all(turn.role != "assistant" for turn in turns):
            self.problems.append(f"{key} has no assistant's turn: nothing to learn")
        return tuple(turns)


def _known_formats(
    objective: str, prompt_key: str | None, completion_key: str | None
) -> dict[str, _Format]:
    """Return the formats that are looked for; the first whose fields are there wins."""
    prompt, completion = prompt_key or "prompt", completion_key or "completion"

    def read_text(found: Mapping[str, Any], checks: _Checks) -> tuple[Turn, ...]:
        return (Turn("assistant", checks.text(found["text"], "text")),)

    def read_completion(found: Mapping[str, Any], checks: _Checks) -> tuple[Turn, ...]:
        return (
            Turn("user", checks.text(found[prompt], prompt)),
            Turn("assistant", checks.text(found[completion], completion, answer=True)),
        )

    def read_alpaca(found: Mapping[str, Any], checks: _Checks) -> tuple[Turn, ...]:
        given = found.get("input")
        given = "" if given is None else checks.text(given, "input")
        instruction = checks.text(found["instruction"], "instruction")
        return (
            Turn("user", instruction, input=given),
            Turn("assistant", checks.text(found["output"], "output", answer=True)),
        )

    def read_messages(found: Mapping[str, Any], checks: _Checks) -> tuple[Turn, ...]:
        return checks.messages(found["messages"], "messages")

    if objective == "dpo":
        fields = (prompt, "chosen", "rejected")
        return {
            PREFERENCES: _Format(
                fields, lambda found, checks: _read_preference(found, checks, prompt)
            ),
            PREFERENCE_MESSAGES: _Format(fields, _read_preference_messages),
        }
    completions = {COMPLETION: _Format((prompt, completion), read_completion)}
    if prompt_key or completion_key:
        return completions
    return {
        MESSAGES: _Format(("messages",), read_messages),
        ALPACA: _Format(("instruction", "output"), read_alpaca),
        **completions,
        TEXT: _Format(("text",), read_text),
    }


def _read_preference(
    found: Mapping[str, Any], checks: _Checks, prompt: str
) -> tuple[Turn, ...]:
    checks.text(found["rejected"], "rejected", answer=True)
    return (
        Turn("user", checks.text(found[prompt], prompt)),
        Turn("assistant", checks.text(found["chosen"], "chosen", answer=True)),
    )


def _read_preference_messages(
    found: Mapping[str, Any], checks: _Checks
) -> tuple[Turn, ...]:
    chosen = checks.messages(found["chosen"], "chosen")
    rejected = checks.messages(found["rejected"], "rejected")
    if checks.problems:
        return ()
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1].role != "assistant":
            checks.problems.append(f"the last of {key} is no assistant's turn")
    if chosen[:-1] != rejected[:-1]:
        checks.problems.append("chosen and rejected differ before their last turn")
    return chosen


def _find_format(found: Mapping[str, Any], formats: Mapping[str, _Format]) -> str:
    """Return the format whose fields are all there, or nothing; null is not there."""
    for name, known in formats.items():
        if all(found.get(key) is not None for key in known.fields):
            if name == PREFERENCES and isinstance(found["chosen"], list):
                return PREFERENCE_MESSAGES
            return name
    return ""


def _read_file(
    path: Path, formats: Mapping[str, _Format], problems: list[str]
) -> Dataset:
    """Read one file; what is wrong with its records is added to `problems`."""
    try:
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        with _open(path) as lines:
            found = list(_read_objects(path, lines, problems))
    except (EOFError, zlib.error) as error:
        raise OpenELMError(
            f"{path} is damaged or cut off: {error}; get it anew."
        ) from error
    except OSError as error:
        raise OpenELMError(f"Cannot read {path}: {error}.") from error
    if not found and not problems:
        raise OpenELMError(f"{path} holds no records; it is empty.")
    named = [_find_format(record, formats) for _, record in found]
    name, first = next(((n, i) for i, n in enumerate(named) if n), ("", 0))
    if found and not name:
        problems.append(f"{path}:{found[0][0]} {_describe_unknown(found, formats)}")
        return Dataset(path, "", (), (), digest)
    records, mixed = [], set()
    for (place, record), other in zip(found, named, strict=True):
        if not other:
            missing = [k for k in formats[name].fields if record.get(k) is None]
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
            checks = _Checks()
            turns = formats[name].read(record, checks)
            problems += [f"{path}:{place}: {problem}" for problem in checks.problems]
            if not checks.problems:
                rejected = _rejected(record) if name.startswith(PREFERENCES) else None
                key = _make_key(turns, rejected)
                records.append(Record(f"{path.name}:{place}", turns, key, rejected))
    fields = formats[name].fields if name else ()
    return Dataset(path, name, fields, tuple(records), digest)


def _rejected(record: Mapping[str, Any]) -> str:
    rejected = record["rejected"]
    return str(rejected if isinstance(rejected, str) else rejected[-1]["content"])


def _make_key(turns: tuple[Turn, ...], rejected: str | None) -> bytes:
    parts = [part for turn in turns for part in (turn.role, turn.text, turn.input)]
    joined = "\0".join(" ".join(part.split()) for part in [*parts, rejected or ""])
    return hashlib.blake2b(joined.encode(), digest_size=16).digest()


def _describe_unknown(
    found: list[tuple[str, dict[str, Any]]], formats: Mapping[str, _Format]
) -> str:
    """Say that no record of a file has the fields of any format."""
    there = set(found[0][1])
    has = ", ".join(sorted(map(str, there))[:10]) or "no fields"
    wanted = "; or ".join(" and ".join(f.fields) for f in formats.values())
    if PREFERENCES in formats:
        wanted = " and ".join(formats[PREFERENCES].fields)
    if {"chosen", "rejected"} <= there and PREFERENCES not in formats:
        advice = "for preferences say --objective dpo"
    elif PREFERENCES in formats:
        advice = "these are what --objective dpo needs"
    else:
        advice = "name other fields by --prompt-key and --completion-key"
    others = f", nor has any of the {len(found)} records" if len(found) > 1 else ""
    return f"has {has}, and not {wanted}{others}: {advice}"


def _list_problems(problems: list[str]) -> str:
    shown = "; ".join(problems[:_MOST_SHOWN])
    more = len(problems) - _MOST_SHOWN
    rest = f"; and {more} more" if more > 0 else ""
    count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
    return f"The data has {count}: {shown}{rest}."


# Bytes to objects ----------------------------------------------------------------


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value] # it reads bytes
    return path.open("rb")


# An array of records; one that starts otherwise is a line that holds no record.
_ARRAY = re.compile(rb"\s*\[\s*([{\]]|$)")


def _read_objects(
    path: Path, lines: IO[bytes], problems: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the object of every record; collect what is none.

    Lines end at a newline: U+2028 and its like may stand inside a text.
    """
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        if _ARRAY.match(line):
            yield from _read_array(path, number, line + lines.read(), problems)
            return
        text = _decode(path, number, line, problems)
        if text is None:
            continue
        value = _parse(path, number, text.rstrip(), problems)
        if isinstance(value, dict):
            yield str(number), value
        elif value is not _NOTHING:
            problems.append(f"{path}:{number} is {_kind(value)}, not an object")


_NOTHING = object()


def _decode(path: Path, line: int, data: bytes, problems: list[str]) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line += before.count(b"\n")
        column = len(before) - before.rfind(b"\n")
        problems.append(
            f"{path}:{line}:{column} is no UTF-8 (the byte 0x{data[error.start]:02x}); "
            "save it as UTF-8"
        )
        return None


def _parse(path: Path, line: int, text: str, problems: list[str]) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{line + error.lineno - 1}:{error.colno}"
        problems.append(f"{path}:{place} is no JSON ({error.msg})")
    except (ValueError, RecursionError) as error:  # an endless number, or nesting
        problems.append(f"{path}:{line} cannot be read as JSON ({error})")
    return _NOTHING


def _read_array(
    path: Path, line: int, data: bytes, problems: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of a JSON array, each with its line and column."""
    text = _decode(path, line, data, problems)
    if text is None:
        return
    values = _parse(path, line, text, problems)
    if values is _NOTHING:
        return
    # It is whole: walk through it again, to learn where each record stands.
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    position = text.index("[") + 1
    line, counted = line + text.count("\n", 0, position), position
    for value in values:
        space = gap.match(text, position)
        assert space is not None  # the pattern matches nothing too
        start = space.end()
        line, counted = line + text.count("\n", counted, start), start
        place = f"{line}:{start - text.rfind(chr(10), 0, start)}"
        _, position = decoder.raw_decode(text, start)
        if isinstance(value, dict):
            yield place, value
        else:
            problems.append(f"{path}:{place} is {_kind(value)}, not an object")


def _kind(value: Any) -> str:
    """Name a JSON value's type for a person."""
    if value is None:
        return "missing or null"
    names = {str: "a text", bool: "true or false", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
