"""A restricted pickle interpreter for the files that torch.save writes.

`pickle` itself is not used: before it calls `find_class`, its C implementation would
hash a tuple nested a million levels deep (which crashes the interpreter) and allocate
2**31 memo entries. Instead `pickletools` decodes the opcodes, and a stack machine
executes those that torch writes. It creates dicts, lists, tuples, scalars and
descriptions of tensors, and calls nothing.
"""

import math
import pickletools
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from converters.formats.pt_archive import PtArchive
from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import list_names

MAX_PICKLE_BYTES = 64 * 2**20
MAX_VALUES = 1_000_000  # opcodes or values; a training state of the 3B has 50,000
MAX_DEPTH = 100  # of containers in containers; a training state has five

_STORAGES = {  # storage class -> dtype of torch and of numpy (without bfloat16)
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

_Opcodes = list[tuple[str, Any]]  # name, decoded argument


@dataclass(frozen=True, slots=True)
class PtStorage:
    archive: PtArchive
    record: str
    dtype: str  # as torch spells it, without "torch."
    numbers: np.dtype[Any]
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class PtTensor:
    """A tensor in a file.

    Attributes:
        offset: of the first element in the storage, in elements, as are `strides`.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: PtStorage

    @property
    def dtype(self) -> str:
        """The dtype as torch spells it, without "torch."."""
        return self.storage.dtype

    @property
    def last(self) -> int:
        """The position of the last element after the first one, in elements."""
        steps = zip(self.shape, self.strides, strict=True)
        return sum((size - 1) * step for size, step in steps)

    def read(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the numbers, bfloat16 as uint16. Raises as `PtArchive.read`."""
        numbers, size = self.storage.numbers, self.storage.numbers.itemsize
        if 0 in self.shape:
            return np.zeros(self.shape, numbers)
        content = self.storage.archive.read(
            self.storage.record, self.offset * size, (self.last + 1) * size
        )
        strides = [step * size for step in self.strides]
        return np.ndarray(self.shape, numbers, content, 0, strides)


def load_pickle(archive: PtArchive) -> tuple[object, set[str]]:
    """Return the object in data.pkl, and the names of unused storages.

    Tensors are `PtTensor`; OrderedDicts become dicts, torch.Sizes tuples, Parameters
    their tensors.

    Raises:
        OpenELMError: the pickle is damaged, too large, or would call a function that is
            not allowed.
    """
    opcodes = _read_opcodes(archive)
    _check_globals(archive.path, opcodes)
    machine = _Machine(archive)
    try:
        value = machine.run(opcodes)
    except (IndexError, KeyError) as error:  # from its stack or its memo
        raise archive.damaged("the pickle uses an undefined value") from error
    _check_tree(archive, value)
    return value, machine.unused


def _read_opcodes(archive: PtArchive) -> _Opcodes:
    if archive.records["data.pkl"].length > MAX_PICKLE_BYTES:
        raise _too_large(archive.path)
    decoded = pickletools.genops(archive.read("data.pkl").tobytes())
    try:
        with warnings.catch_warnings(action="ignore"):  # of invalid escapes
            opcodes = [(op.name, arg) for op, arg, _ in islice(decoded, MAX_VALUES + 1)]
    except ValueError as error:
        raise archive.damaged(f"the pickle is invalid ({error!a})") from error
    if len(opcodes) > MAX_VALUES:
        raise _too_large(archive.path)
    return opcodes


def _check_globals(path: Path, opcodes: _Opcodes) -> None:
    """Raise OpenELMError if a global is not in `_CALLS` or `_STORAGES`."""
    named, texts = [], ["?", "?"]
    for name, arg in opcodes:
        if name in ("GLOBAL", "INST"):
            named.append(arg)
        elif name == "STACK_GLOBAL":  # of protocol 4: takes the last two strings
            named.append(" ".join(texts[-2:]))
        elif isinstance(arg, str):
            texts.append(arg)
    allowed = _CALLS | _STORAGES.keys()
    foreign = dict.fromkeys(name for name in named if name not in allowed)
    if foreign:
        raise OpenELMError(
            f"{path} would call "
            f"{list_names(name.replace(' ', '.') for name in foreign)}; nothing was "
            "run, as only tensors are read. If you trust the file, load it with torch "
            "and save the model's state_dict()."
        )


@dataclass(frozen=True, slots=True)
class _Global:
    name: str  # "module name", of `_CALLS` or `_STORAGES`


class _Machine:
    """Executes opcodes. Raises IndexError or KeyError if stack or memo lack a value."""

    def __init__(self, archive: PtArchive) -> None:
        self.archive = archive
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stack before each MARK
        self.memo: dict[int, Any] = {}
        self.unused = {n for n in archive.records if n.startswith("data/")}

    def run(self, opcodes: _Opcodes) -> object:
        for name, arg in opcodes:
            match name:
                case "PROTO" | "STOP":  # `genops` ends at STOP
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
                case "BUILD":  # module versions of a state dict; ignored
                    self.pop(1)
                    self.top(dict)
                case _:
                    made = self.make(name, arg)
                    self.stack.append(made)
        return self.stack[-1]

    def make(self, name: str, arg: Any) -> object:
        """Return the value that an opcode pushes, after it has popped its operands."""
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
            "not write by default; save it again without `pickle_protocol`."
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
            raise self.unexpected(f"uses another value as a {kind.__name__}")
        return self.stack[-1]

    def unexpected(self, what: str) -> OpenELMError:
        return self.archive.damaged(f"the pickle {what}, unlike those of torch.save")

    def update(self, target: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise IndexError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Names and parameter indices only: hashing others could take very long.
            number = isinstance(key, int) and 0 <= key < 2**32
            if not (isinstance(key, str) or number):
                raise self.unexpected(f"has a {type(key).__name__} as a key")
            if key in target:
                raise self.archive.damaged(f"{list_names([key])} is there twice")
            target[key] = value

    def find_storage(self, persistent_id: object) -> PtStorage:
        match persistent_id:
            case ("storage", _Global(name), str(key), str(), int(length)) if (
                name in _STORAGES and length >= 0
            ):
                dtype, numpy_dtype = _STORAGES[name]
            case _:
                raise self.unexpected("has an unknown kind of storage")
        record, numbers = self.archive.records.get(f"data/{key}"), np.dtype(numpy_dtype)
        if record is None or record.length != length * numbers.itemsize:
            raise self.archive.damaged(
                f"record {list_names([f'data/{key}'])} is missing, too short or too "
                f"long for {length} numbers of {dtype}"
            )
        self.unused.discard(f"data/{key}")
        return PtStorage(self.archive, f"data/{key}", dtype, numbers, length)

    def call(self, function: object, args: object) -> object:
        match function, args:
            case _Global("collections OrderedDict"), ():
                return {}
            case _Global("torch Size"), (tuple(shape),):
                return shape
            case (
                _Global("torch._utils _rebuild_tensor_v2"),
                (PtStorage() as storage, offset, tuple(shape), tuple(strides), *rest),
            ) if not any(rest[2:]):  # metadata, such as the negative bit
                return self.view(storage, offset, shape, strides)
            case _Global(name), (PtTensor() as tensor, *_) if "_parameter" in name:
                return tensor
        raise self.unexpected("has a call with wrong arguments")

    def view(
        self, storage: PtStorage, offset: Any, shape: Any, strides: Any
    ) -> PtTensor:
        """Return a tensor; `offset` and `strides` count elements."""
        proper = len(shape) == len(strides) <= 32 and all(
            type(n) is int and 0 <= n < 2**50 for n in (offset, *shape, *strides)
        )
        # A stride of 0 repeats numbers; the limit counts them, as readers copy.
        limit = self.archive.file.size
        if not proper or math.prod(n or 1 for n in shape) > limit:
            raise self.unexpected("has a tensor larger than the file")
        tensor = PtTensor(shape, strides, offset, storage)
        if 0 not in shape and offset + tensor.last >= storage.length:
            raise self.archive.damaged(
                f"a tensor of shape {shape} exceeds its storage of {storage.length} "
                "numbers"
            )
        return tensor


def _check_tree(archive: PtArchive, root: object) -> None:
    """Raise OpenELMError for cycles, too many values or too deep nesting."""
    pending, count = [(root, 0)], 0
    while pending:
        value, depth = pending.pop()
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
            raise _too_large(archive.path)
        pending += [(child, depth + 1) for child in children]


def _too_large(path: Path) -> OpenELMError:
    return OpenELMError(
        f"{path} contains more than {MAX_VALUES:,} values or {MAX_DEPTH} levels of "
        "nesting, too many for an OpenELM; save only the model's state_dict()."
    )
