"""torch.save's files read without torch: nothing in them runs, no number is copied.

Such a file (CoreNet's `.pt`, `pytorch_model.bin`) is a zip of uncompressed records:
`NAME/data.pkl`, a pickle that describes the saved mapping, and `NAME/data/KEY`, the
numbers of one storage. A tensor in the pickle is a call, `_rebuild_tensor_v2(storage,
offset, shape, strides, ...)`; here it becomes a view of the mapped file.

The pickle is not handed to `pickle`: without asking `find_class`, its C machine would
hash a tuple nested a million deep (the interpreter dies) and make room for 2**31 memo
entries. Instead `pickletools` decodes the opcodes, and a stack machine obeys those that
torch writes. It makes dicts, lists, tuples, scalars and views and calls nothing else.
"""

import math
import mmap
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mlx_openelm.errors import OpenELMError

Array = np.ndarray[Any, np.dtype[Any]]

STATE_DICT_KEYS = ("model_state_dict", "ema_state_dict", "state_dict", "model")

MAX_PICKLE_BYTES = 64 * 2**20
MAX_VALUES = 1_000_000  # opcodes or values; a training state of the 3B has 50,000
MAX_DEPTH = 100  # of containers in containers; a training state has five

_STORAGES = {  # -> torch's dtype, numpy's (which has no bfloat16)
    "torch DoubleStorage": ("float64", "<f8"),
    "torch FloatStorage": ("float32", "<f4"),
    "torch HalfStorage": ("float16", "<f2"),
    "torch BFloat16Storage": ("bfloat16", "<u2"),
    "torch LongStorage": ("int64", "<i8"),
    "torch IntStorage": ("int32", "<i4"),
    "torch ShortStorage": ("int16", "<i2"),
    "torch CharStorage": ("int8", "i1"),
    "torch ByteStorage": ("uint8", "u1"),
    "torch BoolStorage": ("bool", "?"),
}
_CALLS = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
}
_OTHER_FILES = {  # how they begin -> what they are, and what to do
    b"PK\x03\x04": "is a zip without a proper end; copy or download it again",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19": "was saved in the form before torch "
    "1.6; load it with a current torch and save it again",
    b"version https://git-lfs": "is Git LFS's pointer to the file; run git lfs pull",
}


@dataclass(frozen=True, slots=True, eq=False)
class PtTensor:
    """A tensor of the file; `array` is a read-only view of it, bfloat16 as uint16."""

    dtype: str  # as torch spells it, without "torch."
    shape: tuple[int, ...]
    array: Array


def read_state_dict(path: Path) -> dict[str, PtTensor]:
    """Return the model's tensors by name, the names as they are.

    They are the file's mapping, or the one under the first of `STATE_DICT_KEYS` in it.

    Raises:
        OpenELMError: as `read_pt`, or there are no tensors, or other things among them,
            numbers of no tensor, or a tensor that has some number twice.
    """
    machine, found = _read(path)
    inner = (found[key] for key in STATE_DICT_KEYS if isinstance(found.get(key), dict))
    found = next(inner, found)
    found.pop("_metadata", None)  # torch's module versions; no tensor depends on them
    others = [
        name
        for name, value in found.items()
        if not (isinstance(name, str) and isinstance(value, PtTensor))
    ]
    if others or not found:
        raise OpenELMError(
            f"{path} should hold tensors by name and nothing else, at the top or under "
            f"{' or '.join(STATE_DICT_KEYS)}; found {_listed(others)}; save the "
            "model's state_dict() by itself."
        )
    if machine.unused:  # so some tensor points to the numbers of another
        raise machine.archive.damaged(
            f"record {_listed(sorted(machine.unused))} belongs to no tensor"
        )
    folded = [name for name, tensor in found.items() if _is_folded(tensor.array)]
    if folded:
        raise machine.archive.damaged(
            f"{_listed(folded)} would have one number in several places"
        )
    return found


def read_pt(path: Path) -> dict[str, Any]:
    """Return the mapping that a file holds: tensors as `PtTensor`, the rest plain.

    OrderedDicts become dicts, torch.Sizes tuples, Parameters their tensors.

    Raises:
        OpenELMError: the file cannot be read, is not torch.save's, is damaged, or wants
            something run.
    """
    _, found = _read(path)
    return found


def _read(path: Path) -> tuple["_Machine", dict[str, Any]]:
    archive = _open(path)
    opcodes = _read_opcodes(archive)
    _check_globals(path, opcodes)
    machine = _Machine(archive)
    try:
        found = machine.run(opcodes)
    except (IndexError, KeyError) as error:  # from its stack or its memo
        raise archive.damaged("the pickle uses a value before it is there") from error
    _check_tree(archive, found)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise OpenELMError(
            f"{path} holds a {type(found).__name__}, expected a mapping from names; "
            "save the model's state_dict()."
        )
    return machine, found


# The zip -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Archive:
    path: Path
    data: Array  # the whole file, mapped; bytes
    records: dict[str, tuple[int, int]]  # name without "NAME/" -> start, length; bytes

    def damaged(self, why: str) -> OpenELMError:
        return OpenELMError(
            f"{self.path} is damaged: {why}; copy or download it again."
        )

    def too_large(self) -> OpenELMError:
        return OpenELMError(
            f"{self.path} describes more than {MAX_VALUES:,} values, or {MAX_DEPTH} "
            "levels of them, which no OpenELM needs; save the model's state_dict() by "
            "itself."
        )


def _open(path: Path) -> _Archive:
    """Map a file and find its records."""
    head = b""
    try:
        if not path.is_file():  # a pipe would be waited for without end
            kind = "a folder" if path.is_dir() else "not there, or no file"
            raise OpenELMError(f"{path} is {kind}; give a .pt or .bin file.")
        with path.open("rb") as file:
            head = file.read(64)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with zipfile.ZipFile(file) as zipped:
                entries = zipped.infolist()
    except OSError as error:
        raise OpenELMError(f"Cannot read {path}: {error}.") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        found = (said for start, said in _OTHER_FILES.items() if head.startswith(start))
        begins = f"begins with {head[:12]!r}" if head else "is empty"
        said = next(found, f"is not torch.save's: it {begins}; give a .pt or .bin file")
        raise OpenELMError(f"{path} {said}.") from error
    archive = _Archive(path, np.frombuffer(mapped, np.uint8), {})
    names = [entry.filename for entry in entries]
    root = names[0].partition("/")[0] if names else ""
    if f"{root}/data.pkl" not in names:
        raise OpenELMError(
            f"{path} is a zip without data.pkl, so not torch.save's; found "
            f"{_listed(names)}; give a .pt or .bin file."
        )
    for entry in entries:
        folder, _, name = entry.filename.partition("/")
        if folder != root or name in archive.records:
            raise archive.damaged(
                f"record {_listed([entry.filename])} is there twice, or astray"
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
            f"{path} was saved on a big-endian machine, whose numbers are not read "
            "here; load it with torch there and save it as safetensors."
        )
    return archive


def _locate(archive: _Archive, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Return a record's start and length."""
    at, size = entry.header_offset, archive.data.size
    if 0 <= at <= size - 30:
        # Its own header alone tells its name's length and how much torch has padded.
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
    raise archive.damaged(f"{_listed([entry.filename])} is not where the zip says")


def _encoding(entry: zipfile.ZipInfo) -> str:
    """Return how a record's name is spelled in the file."""
    return "utf-8" if entry.flag_bits & 0x800 else "cp437"


def _is_extra(extra: bytes) -> bool:
    """Whether a record's extra field is fields: each a kind, a length, and so much."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 0 or length > len(extra) - 4:
            return False
        extra = extra[4 + length :]
    return not extra


# The pickle --------------------------------------------------------------------------

_Opcodes = list[tuple[str, Any]]  # name, decoded argument


def _read_opcodes(archive: _Archive) -> _Opcodes:
    start, length = archive.records["data.pkl"]
    if length > MAX_PICKLE_BYTES:
        raise archive.too_large()
    decoded = pickletools.genops(archive.data[start : start + length].tobytes())
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in old texts
            opcodes = [(op.name, arg) for op, arg, _ in islice(decoded, MAX_VALUES + 1)]
    except ValueError as error:
        raise archive.damaged(f"the pickle makes no sense ({error!a})") from error
    if len(opcodes) > MAX_VALUES:
        raise archive.too_large()
    return opcodes


def _check_globals(path: Path, opcodes: _Opcodes) -> None:
    """Refuse a pickle that names anything but the few things that tensors need."""
    named, texts = [], ["?", "?"]
    for name, arg in opcodes:
        if name in ("GLOBAL", "INST"):
            named.append(arg)
        elif name == "STACK_GLOBAL":  # of protocol 4: takes the last two texts
            named.append(" ".join(texts[-2:]))
        elif isinstance(arg, str):
            texts.append(arg)
    allowed = _CALLS | _STORAGES.keys()
    foreign = dict.fromkeys(name for name in named if name not in allowed)
    if foreign:
        raise OpenELMError(
            f"{path} wants to run or make "
            f"{_listed(name.replace(' ', '.') for name in foreign)}; nothing was run. "
            "Only plain tensors are read: if you trust the file, load it with torch "
            "and save the model's state_dict()."
        )


@dataclass(frozen=True, slots=True)
class _Global:
    name: str  # "module name", of `_CALLS` or `_STORAGES`


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    numbers: Array  # in one dimension


class _Machine:
    """Obeys opcodes; IndexError, KeyError: a value is not on the stack, in the memo."""

    def __init__(self, archive: _Archive) -> None:
        self.archive = archive
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # what lay on the stack before each MARK
        self.memo: dict[int, Any] = {}
        self.unused = {n for n in archive.records if n.startswith("data/")}

    def run(self, opcodes: _Opcodes) -> object:
        for name, arg in opcodes:
            match name:
                case "PROTO" | "STOP":  # nothing follows STOP: `genops` ends there
                    pass
                case "MARK":
                    self.marked.append(self.stack)
                    self.stack = []
                case "BINPUT" | "LONG_BINPUT":
                    self.memo[arg] = self.stack[-1]
                case "APPEND" | "APPENDS":
                    items = self.pop(1) if name == "APPEND" else self.pop_to_mark()
                    self.top(list).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = self.pop(2) if name == "SETITEM" else self.pop_to_mark()
                    self.update(self.top(dict), items)
                case "BUILD":  # gives a state dict its module versions; not kept
                    self.pop(1)
                    self.top(dict)
                case _:
                    made = self.make(name, arg)
                    self.stack.append(made)
        return self.stack[-1]

    def make(self, name: str, arg: Any) -> object:
        """Return what an opcode puts on the stack, having taken what it takes."""
        match name:
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                return arg
            case "NONE":
                return None
            case "NEWTRUE" | "NEWFALSE":
                return name == "NEWTRUE"
            case "EMPTY_LIST":
                return []
            case "EMPTY_DICT":
                return {}
            case "EMPTY_TUPLE":
                return ()
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(self.pop(int(name[-1])))
            case "TUPLE":
                return tuple(self.pop_to_mark())
            case "BINGET" | "LONG_BINGET":
                return self.memo[arg]
            case "GLOBAL":
                return _Global(arg)
            case "BINPERSID":
                return self.find_storage(*self.pop(1))
            case "REDUCE":
                return self.call(*self.pop(2))
        raise OpenELMError(
            f"{self.archive.path} has the pickle opcode {name}, which torch.save does "
            "not write; save it again with torch.save's own pickle_protocol."
        )

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise self.strange(f"takes something for a {kind.__name__} that is none")
        return self.stack[-1]

    def strange(self, what: str) -> OpenELMError:
        return self.archive.damaged(f"the pickle {what}, as torch.save never does")

    def update(self, target: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise IndexError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A name, or a parameter's number. To hash other things may take for ever.
            number = isinstance(key, int) and 0 <= key < 2**32
            if not (isinstance(key, str) or number):
                raise self.strange(f"has a {type(key).__name__} for a key")
            if key in target:
                raise self.archive.damaged(f"there are two of {_listed([key])}")
            target[key] = value

    def find_storage(self, persistent_id: object) -> _Storage:
        match persistent_id:
            case ("storage", _Global(name), str(key), str(), int(length)) if (
                name in _STORAGES and length >= 0
            ):
                dtype, numpy_dtype = _STORAGES[name]
            case _:
                raise self.strange("describes a storage otherwise")
        start, num_bytes = self.archive.records.get(f"data/{key}", (0, -1))
        size = length * np.dtype(numpy_dtype).itemsize
        if size != num_bytes:
            raise self.archive.damaged(
                f"record {_listed([f'data/{key}'])} is missing, too short or too long "
                f"for {length} numbers of {dtype}"
            )
        self.unused.discard(f"data/{key}")
        return _Storage(
            dtype, self.archive.data[start : start + size].view(numpy_dtype)
        )

    def call(self, function: object, args: object) -> object:
        match function, args:
            case _Global("collections OrderedDict"), ():
                return {}
            case _Global("torch Size"), (tuple(shape),):
                return shape
            case (
                _Global("torch._utils _rebuild_tensor_v2"),
                (_Storage() as storage, offset, tuple(shape), tuple(strides), *rest),
            ) if not any(rest[2:]):  # which would say that the numbers are negated
                return self.view(storage, offset, shape, strides)
            case _Global(name), (PtTensor() as tensor, *_) if "_parameter" in name:
                return tensor
        raise self.strange("makes a call with other arguments")

    def view(
        self, storage: _Storage, offset: Any, shape: Any, strides: Any
    ) -> PtTensor:
        """Return a tensor; `offset` and `strides` count elements."""
        proper = len(shape) == len(strides) <= 32 and all(
            type(n) is int and 0 <= n < 2**50 for n in (offset, *shape, *strides)
        )
        # A stride of 0 repeats numbers; as readers copy them, this has a bound too.
        limit = self.archive.data.size
        if not proper or math.prod(n or 1 for n in shape) > limit:
            raise self.strange("has a tensor larger than the file")
        numbers, empty = storage.numbers, 0 in shape
        last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if not empty and offset + last >= numbers.size:
            raise self.archive.damaged(
                f"a tensor of shape {shape} reaches beyond its {numbers.size} numbers"
            )
        array: Array = np.ndarray(
            shape,
            numbers.dtype,
            numbers,
            0 if empty else offset * numbers.itemsize,
            [step * numbers.itemsize for step in strides],
        )
        return PtTensor(storage.dtype, shape, array)


def _is_folded(array: Array) -> bool:
    """Whether several places of an array share a number; a weight's never do."""
    if array.size == 0:
        return False
    dims = zip(array.strides, array.shape, strict=True)
    reached = 0  # from the first number, in bytes
    for step, size in sorted((step, size) for step, size in dims if size > 1):
        if step <= reached:
            return True
        reached += step * (size - 1)
    return False


def _check_tree(archive: _Archive, root: object) -> None:
    """Refuse what a reader could not walk through: cycles, and doubling without end."""
    waiting, count = [(root, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        match value:
            case dict():
                children = list(value.values())
            case list() | tuple():
                children = list(value)
            case None | bool() | int() | float() | str() | PtTensor():
                continue
            case _:
                raise OpenELMError(
                    f"{archive.path} holds a bare storage or class; save the model's "
                    "state_dict()."
                )
        count += len(children)
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise archive.too_large()
        waiting += [(child, depth + 1) for child in children]


def _listed(names: Iterable[object], most: int = 6) -> str:
    shown = [ascii(name)[:100] for name in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return (", ".join(shown[:most]) or "nothing") + more
