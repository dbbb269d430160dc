"""Hand-made files of torch.save, opcode by opcode."""

import io
import pickle
import zipfile
from typing import Any

import numpy as np

MARK, TUPLE, REDUCE, BUILD, STOP = b"(", b"t", b"R", b"b", b"."
EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE, SETITEM, APPENDS = b"}", b"]", b")", b"s", b"e"
ORDERED_DICT = b"ccollections\nOrderedDict\n"


def plain(value: object) -> bytes:
    """Return the opcodes that push a plain value onto the stack."""
    return pickle.dumps(value, 2)[2:-1]


def storage(key: str = "0", kind: str = "FloatStorage", length: int = 6) -> bytes:
    facts = plain(key) + plain("cpu") + plain(length)
    return (
        MARK + plain("storage") + b"ctorch\n%b\n" % kind.encode() + facts + TUPLE + b"Q"
    )


def tensor(
    offset: object = 0,
    shape: object = (2, 3),
    strides: object = (3, 1),
    extra: bytes = b"",
    **of_storage: Any,
) -> bytes:
    args = storage(**of_storage) + plain(offset) + plain(shape) + plain(strides)
    hooks = plain(False) + ORDERED_DICT + EMPTY_TUPLE + REDUCE
    call = b"ctorch._utils\n_rebuild_tensor_v2\n" + MARK + args + hooks + extra
    return call + TUPLE + REDUCE


def mapping(**items: bytes) -> bytes:
    pairs = (plain(name) + value + SETITEM for name, value in items.items())
    return b"\x80\x02" + EMPTY_DICT + b"".join(pairs) + STOP


NUMBERS = np.arange(6, dtype="<f4")
GOOD = mapping(w=tensor())


def zipped(
    data: bytes = GOOD,
    records: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    records = {"data/0": NUMBERS.tobytes()} if records is None else records
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in {"data.pkl": data, **records}.items():
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()
