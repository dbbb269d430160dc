"""Files of torch.save: read as torch reads them, without running code in them."""

import builtins
import io
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pickles import (
    APPENDS,
    BUILD,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    GOOD,
    MARK,
    NUMBERS,
    ORDERED_DICT,
    REDUCE,
    SETITEM,
    STOP,
    TUPLE,
    mapping,
    plain,
    storage,
    tensor,
    zipped,
)

from converters.formats.pickle_machine import PtTensor, load_pickle
from converters.formats.pt_archive import open_archive
from converters.formats.pt_reader import read_checkpoint
from mlx_openelm.errors import OpenELMError


def read_pt(path: Path) -> Any:
    """Return the object in a file, a state dict or something else."""
    value, _ = load_pickle(open_archive(path))
    return value


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Callable[..., Path]:
    def write(data: bytes = GOOD, *args: Any, **options: Any) -> Path:
        path = tmp_path / "model.pt"
        path.write_bytes(zipped(data, *args, **options))
        return path

    return write


@contextmanager
def refused(path: Path, *words: str) -> Iterator[None]:
    """Expect a short error that names the file and contains `words`."""
    with pytest.raises(OpenELMError) as caught:
        yield
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 2000
    assert message.endswith(".")
    for word in words:
        assert word in message


def test_a_handmade_file_is_read(file: Callable[..., Path]) -> None:
    read = read_checkpoint(file()).tensors
    assert list(read) == ["w"]
    assert (read["w"].dtype, read["w"].shape) == ("float32", (2, 3))
    np.testing.assert_array_equal(read["w"].read(), NUMBERS.reshape(2, 3))


# Compared with torch.load ------------------------------------------------------------


def assert_same(ours: PtTensor, theirs: Any) -> None:
    torch = pytest.importorskip("torch")
    assert f"torch.{ours.dtype}" == str(theirs.dtype)
    read = ours.read()
    assert ours.shape == read.shape == tuple(theirs.shape)
    if theirs.dtype == torch.bfloat16:
        theirs = theirs.view(torch.uint16)
    assert read.dtype == theirs.numpy().dtype
    assert read.tobytes() == theirs.numpy().tobytes()


def assert_read_as_torch_reads(value: Any, path: Path, **options: Any) -> None:
    """Save a mapping of tensors with torch and compare the two readings."""
    torch = pytest.importorskip("torch")
    torch.save(value, path, **options)
    ours, theirs = read_pt(path), torch.load(path, weights_only=True)
    assert list(ours) == list(theirs)
    for name in theirs:
        assert_same(ours[name], theirs[name].detach())


DTYPES = [
    *("float64", "float32", "float16", "bfloat16"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_equals_torchs_reading(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    values = torch.randn(3, 5, generator=torch.manual_seed(0)) * 50
    saved = {"x": values.to(getattr(torch, dtype)), "y": values}
    assert_read_as_torch_reads(saved, tmp_path / "x.pt")


def test_every_view_equals_torchs_reading(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    views = {
        "whole": base,
        "transposed": base.T,
        "rows": base[1:3],
        "column": base[:, 2],
        "every other": base[::2, ::3],
        "one number": base[3, 5],
        "permuted": base.reshape(2, 3, 4).permute(2, 0, 1),
        "repeated": base[:1].expand(5, 6),
        "windows": base.flatten().unfold(0, 4, 2),
        "no rows": base[4:],
        "no columns": torch.zeros(3, 0),
        "scalar": torch.tensor(7.5),
        "tall": base.as_strided((3, 1), (2, 10**9)),
    }
    assert_read_as_torch_reads(views, tmp_path / "x.pt")


@given(data=st.data())
@settings(max_examples=40)
def test_any_strided_view_equals_torchs_reading(
    folder: Path, data: st.DataObject
) -> None:
    torch = pytest.importorskip("torch")
    sizes = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=4)
    drawn = data.draw(sizes)
    shape, strides = [n for n, _ in drawn], [step for _, step in drawn]
    offset = data.draw(st.integers(0, 9))
    needed = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    base = torch.arange(max(needed, 1), dtype=torch.int16)
    view = base.as_strided(shape, strides, offset)
    assert_read_as_torch_reads({"view": view}, folder / "view.pt")


def test_parameters_equal_torchs_reading(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    with_state = torch.nn.Parameter(torch.ones(2))
    with_state.note = "a parameter with a state"
    saved = {"p": torch.nn.Parameter(torch.randn(2, 3)), "q": with_state}
    assert_read_as_torch_reads(saved, tmp_path / "x.pt")


def test_a_modules_state_dict_equals_torchs_reading(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    assert_read_as_torch_reads(module.state_dict(), tmp_path / "x.pt")
    names = list(read_checkpoint(tmp_path / "x.pt").tensors)
    assert names == list(module.state_dict())


def test_a_training_state_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    saved = {
        "iterations": 7,
        "epoch": 0,
        "model_state_dict": module.state_dict(),
        "optim_state_dict": optimizer.state_dict(),
        "best_metric": float("inf"),
        "is_interval_ckpt": False,
        "gradient_scaler_state_dict": {},
        "ema_state_dict": {"weight": torch.zeros(1)},
        "others": [None, -1, 2**70, "é\ud800", (), torch.Size([2, 3]), [True, [1.5]]],
    }
    torch.save(saved, tmp_path / "x.pt")
    ours = read_pt(tmp_path / "x.pt")
    theirs = torch.load(tmp_path / "x.pt", weights_only=True)

    def compare(ours: Any, theirs: Any) -> None:
        if isinstance(theirs, torch.Tensor):
            assert_same(ours, theirs)
        elif isinstance(theirs, dict):
            assert list(ours) == list(theirs)
            for key in theirs:
                compare(ours[key], theirs[key])
        else:
            assert ours == theirs
            assert isinstance(theirs, type(ours))

    compare(ours, theirs)
    assert list(read_checkpoint(tmp_path / "x.pt").tensors) == ["weight", "bias"]


@pytest.mark.parametrize("protocol", [2, 3])
def test_pickle_protocols_that_torch_reads_are_read(
    tmp_path: Path, protocol: int
) -> None:
    torch = pytest.importorskip("torch")
    saved = {"x": torch.ones(3)}
    path = tmp_path / "x.pt"
    torch.save(saved, path, pickle_protocol=protocol)
    assert_same(read_pt(path)["x"], saved["x"])


@pytest.mark.parametrize("name", ["conj", "complex", "uint16", "sparse"])
def test_unsupported_tensors_are_refused(tmp_path: Path, name: str) -> None:
    torch = pytest.importorskip("torch")
    make = {
        "conj": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
        "complex": lambda: torch.ones(3, dtype=torch.complex64),
        "uint16": lambda: torch.ones(3, dtype=torch.uint16),
        "sparse": lambda: torch.eye(3).to_sparse(),
    }
    path = tmp_path / "x.pt"
    torch.save({"x": make[name]()}, path)
    with refused(path):
        read_pt(path)


def test_negated_tensors_are_refused(file: Callable[..., Path]) -> None:
    path = file(mapping(w=tensor(extra=plain({"neg": True}))))
    with refused(path, "call"):
        read_pt(path)
    assert read_pt(file(mapping(w=tensor(extra=plain({})))))["w"].shape == (2, 3)


# Numbers are read on demand -----------------------------------------------------------


def test_a_view_is_read_without_the_rest_of_its_storage(
    file: Callable[..., Path],
) -> None:
    count = 2**22
    few = tensor(offset=count - 3, shape=(3,), strides=(1,), length=count)
    path = file(
        mapping(w=few), {"data/0": bytes(4 * count - 4) + NUMBERS[1:2].tobytes()}
    )
    tensors = read_pt(path)
    tensors["w"].read()  # compares the checksum of the whole storage, once
    with bounded(seconds=5, megabytes=1):
        np.testing.assert_array_equal(tensors["w"].read(), [0, 0, 1])


def test_opening_takes_no_memory_for_the_numbers(file: Callable[..., Path]) -> None:
    count = 2**22
    description = tensor(shape=(count,), strides=(1,), length=count)
    path = file(mapping(w=description), {"data/0": bytes(4 * count)})
    with bounded(seconds=5, megabytes=1):
        assert read_pt(path)["w"].shape == (count,)


def test_zip64_is_read(
    file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("ZIP64_LIMIT", "ZIP_FILECOUNT_LIMIT"):
        monkeypatch.setattr(zipfile, limit, 1)
    path = file()
    assert b"PK\x06\x06" in path.read_bytes()
    np.testing.assert_array_equal(read_pt(path)["w"].read(), NUMBERS.reshape(2, 3))


# The state dict ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["model_state_dict", "ema_state_dict", "state_dict", "model"]
)
def test_a_wrapped_state_dict_is_read(file: Callable[..., Path], key: str) -> None:
    inner = mapping(**{"module.w": tensor()})[2:-1]
    read = read_checkpoint(file(mapping(**{key: inner, "loss": tensor()}))).tensors
    assert list(read) == ["module.w"]


def test_the_model_takes_precedence_over_its_average(file: Callable[..., Path]) -> None:
    ema, model = (mapping(**{name: tensor()})[2:-1] for name in ("ema", "model"))
    path = file(mapping(ema_state_dict=ema, model_state_dict=model))
    assert list(read_checkpoint(path).tensors) == ["model"]


def test_torchs_metadata_is_left_out(file: Callable[..., Path]) -> None:
    state = ORDERED_DICT + EMPTY_TUPLE + REDUCE
    state += plain("w") + tensor() + SETITEM + plain({"_metadata": {"": 1}}) + BUILD
    assert list(read_pt(file(b"\x80\x02" + state + STOP))) == ["w"]
    path = file(mapping(w=tensor(), _metadata=plain({"": {"version": 1}})))
    assert list(read_checkpoint(path).tensors) == ["w"]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (mapping(), "nothing"),
        (mapping(w=tensor(), lr=plain(0.1), notes=plain([1])), "'lr', 'notes'"),
        (mapping(model_state_dict=plain({1: 2})), "1"),
        (mapping(model_state_dict=plain({})), "nothing"),
        (mapping(**{f"n{i}": plain(i) for i in range(99)}), "and 93 more"),
    ],
)
def test_a_state_dict_with_other_values_is_refused(
    file: Callable[..., Path], data: bytes, word: str
) -> None:
    path = file(data)
    read_pt(path)
    with refused(path, word, "state_dict()"):
        read_checkpoint(path)


# Pickles with code -------------------------------------------------------------------


class Exploit:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path, function: Callable[..., Any] = os.mkdir) -> None:
        self.marker, self.function = marker, function

    def __reduce__(self) -> tuple[Any, ...]:
        if self.function is os.mkdir:
            return os.mkdir, (str(self.marker),)
        if self.function is os.system:
            return os.system, (f"mkdir '{self.marker}'",)
        return self.function, (f"__import__('os').mkdir({str(self.marker)!r})",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.mkdir, "posix.mkdir"),
        (os.system, "posix.system"),
        (builtins.eval, "eval"),
        (builtins.exec, "exec"),
    ],
)
def test_code_is_reported_and_not_run(
    file: Callable[..., Path],
    tmp_path: Path,
    protocol: int,
    function: Callable[..., Any],
    name: str,
) -> None:
    marker = tmp_path / "marker"
    data = pickle.dumps({"w": Exploit(marker, function)}, protocol)
    pickle.loads(data)
    assert marker.exists(), "pickle did not run the code; the test is ineffective"
    marker.rmdir()
    path = file(data)
    with refused(path, name, "nothing was run"):
        read_pt(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch.load",
        "torch.hub.load",
        "torch.storage.UntypedStorage",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_device_tensor_from_numpy",
        "torch.Tensor",
        "torch._tensor._rebuild_from_type_v2",
        "numpy._core.multiarray._reconstruct",
        "_codecs.encode",
        "collections.OrderedDict.fromkeys",
        "collections.Counter",
        "builtins.getattr",
        "builtins.dict",
        "copyreg._reconstructor",
        "converters.formats.pt_reader.read_checkpoint",
    ],
)
def test_globals_that_tensors_do_not_need_are_refused(
    file: Callable[..., Path], name: str
) -> None:
    module, _, attribute = name.rpartition(".")
    path = file(mapping(w=f"c{module}\n{attribute}\n".encode() + EMPTY_TUPLE + REDUCE))
    with refused(path, name, "nothing was run"):
        read_pt(path)


def test_all_forbidden_globals_are_reported(file: Callable[..., Path]) -> None:
    path = file(mapping(a=b"cos\nsystem\n", b=b"cbuiltins\neval\n"))
    with refused(path, "os.system", "builtins.eval"):
        read_pt(path)


def test_stack_global_is_refused_with_its_name(file: Callable[..., Path]) -> None:
    name = b"\x8c\x05posix\x94\x8c\x06system\x94\x93"
    path = file(b"\x80\x04}\x94\x8c\x01w\x94" + name + b"\x8c\x02id\x94\x85\x94R\x94s.")
    with refused(path, "posix.system", "nothing was run"):
        read_pt(path)


def test_stack_global_is_refused_even_for_an_allowed_name(
    file: Callable[..., Path],
) -> None:
    path = file(b"\x80\x04\x8c\x05torch\x94\x8c\x04Size\x94\x93.")
    with refused(path, "SHORT_BINUNICODE", "pickle_protocol"):
        read_pt(path)


@pytest.mark.parametrize(
    "owner",
    [
        ORDERED_DICT,
        b"ctorch\nFloatStorage\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch\nSize\n",
        tensor(),
        storage(),
        plain("text"),
        plain(1),
        EMPTY_TUPLE,
        EMPTY_LIST,
    ],
)
@pytest.mark.parametrize(
    "state",
    [
        {"array": 1, "name": "os system", "__code__": 1},
        (None, {"array": 1, "dtype": "x", "name": "os system", "__defaults__": ()}),
        ["float32", (1000,), None],
    ],
)
def test_build_sets_no_attributes(
    file: Callable[..., Path], owner: bytes, state: object
) -> None:
    path = file(mapping(w=owner + plain(state) + BUILD))
    with refused(path, "dict"):
        read_pt(path)


@pytest.mark.parametrize("state", [{"items": 1}, (None, {"items": 1, "get": 2}), None])
def test_build_on_a_dict_changes_nothing(
    file: Callable[..., Path], state: object
) -> None:
    owner = mapping(w=tensor())[2:-1]
    read = read_pt(file(b"\x80\x02" + owner + plain(state) + BUILD + STOP))
    assert type(read) is dict
    assert list(read.items()) == [("w", read["w"])]


@pytest.mark.parametrize(
    "call",
    [
        ORDERED_DICT + plain(([("a", 1)],)),
        ORDERED_DICT + plain(5),
        b"ctorch\nSize\n" + plain((10**9,)),
        b"ctorch\nFloatStorage\n" + plain((10**9,)),
        b"ctorch._utils\n_rebuild_parameter\n" + plain((1, True, None)),
        b"ctorch._utils\n_rebuild_tensor_v2\n" + plain((1, 2, (3,), (4,), False, None)),
        plain("os.system") + plain(("id",)),
        tensor() + EMPTY_TUPLE,
        EMPTY_DICT + EMPTY_TUPLE,
    ],
)
def test_calls_with_wrong_arguments_are_refused(
    file: Callable[..., Path], call: bytes
) -> None:
    path = file(mapping(w=call + REDUCE))
    with refused(path, "call"):
        read_pt(path)


def test_only_storages_are_loaded_by_persistent_id(file: Callable[..., Path]) -> None:
    for persistent_id in ("os.system", ("module", "os", "0", "cpu", 6), (), 0):
        path = file(mapping(w=plain(persistent_id) + b"Q"))
        with refused(path, "storage"):
            read_pt(path)


def test_a_bare_storage_or_class_is_refused(file: Callable[..., Path]) -> None:
    for value in (storage(), ORDERED_DICT, b"ctorch\nSize\n"):
        path = file(mapping(w=value))
        with refused(path, "bare"):
            read_pt(path)


# Resource limits ---------------------------------------------------------------------


@contextmanager
def bounded(seconds: float, megabytes: float) -> Iterator[None]:
    """Limit the CPU time and the memory allocated by Python."""
    started = time.process_time()
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 1e6
    assert time.process_time() - started < seconds


def test_a_large_memo_index_allocates_no_memory(
    file: Callable[..., Path],
) -> None:
    put = b"r\xff\xff\xff\x7f"
    path = file(mapping(w=plain(5) + put, v=b"j\xff\xff\xff\x7f"))
    with bounded(seconds=5, megabytes=1):
        assert read_pt(path) == {"w": 5, "v": 5}


@pytest.mark.parametrize(
    "declared",
    [
        b"X\xff\xff\xff\xff",  # BINUNICODE
        b"B\xff\xff\xff\xff",  # BINBYTES
        b"\x8e" + b"\xff" * 7 + b"\x0f",  # BINBYTES8
        b"\x96" + b"\xff" * 7 + b"\x0f",  # BYTEARRAY8
        b"\x8b\xff\xff\xff\x7f",  # LONG4
        b"\x95" + b"\xff" * 7 + b"\x0f",  # FRAME
        b"L" + b"9" * 100_000 + b"L\n",  # LONG, in decimal
    ],
)
def test_declared_sizes_are_not_allocated(
    file: Callable[..., Path], declared: bytes
) -> None:
    path = file(mapping(w=declared + b"abc"))
    with bounded(seconds=5, megabytes=2), refused(path):
        read_pt(path)


def doubled(once: bytes, times: int) -> bytes:
    """Return the opcodes of (x, x), (then (y, y) of that, and so on)."""
    return once + b"".join(
        b"r%b" % struct.pack("<I", i) + b"j%b" % struct.pack("<I", i) + b"\x86"
        for i in range(times)
    )


@pytest.mark.parametrize(
    "value",
    [
        doubled(plain("x"), 60),
        EMPTY_LIST + b"q\x07" + b"h\x07a",  # a list in itself
        EMPTY_LIST + b"q\x07" + MARK + b"h\x07" * 3_000 + APPENDS,
        EMPTY_DICT + b"q\x07" + plain("k") + b"h\x07s",
        EMPTY_TUPLE + b"\x85" * 9_000,
        EMPTY_LIST * 4_000 + b"a" * 3_999,
        MARK * 4_000 + TUPLE * 4_000,
    ],
    ids=["doubling", "cycle", "wide cycle", "dict", "tuples", "lists", "marks"],
)
def test_values_that_are_too_large_to_traverse_are_refused(
    file: Callable[..., Path], value: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converters.formats.pickle_machine.MAX_VALUES", 10_000)
    path = file(mapping(w=value))
    with bounded(seconds=5, megabytes=5), refused(path, "levels"):
        read_pt(path)


@pytest.mark.parametrize(
    "key",
    [EMPTY_TUPLE + b"\x85" * 20_000, doubled(plain("x"), 60), plain(2**900), tensor()],
    ids=["deep", "doubling", "long", "tensor"],
)
def test_keys_that_take_long_to_hash_are_refused(
    file: Callable[..., Path], key: bytes
) -> None:
    path = file(mapping(w=EMPTY_DICT + key + plain(1) + SETITEM))
    with bounded(seconds=5, megabytes=20), refused(path, "key"):
        read_pt(path)


def test_a_pickle_of_too_many_opcodes_is_refused(
    file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converters.formats.pickle_machine.MAX_VALUES", 1000)
    path = file(mapping(w=MARK + b"N" * 1000 + TUPLE))
    with refused(path, "1,000"):
        read_pt(path)
    assert len(read_pt(file(mapping(w=MARK + b"N" * 900 + TUPLE)))["w"]) == 900
    monkeypatch.setattr("converters.formats.pickle_machine.MAX_PICKLE_BYTES", 900)
    with refused(path):
        read_pt(path)


# Damaged files -----------------------------------------------------------------------


def test_missing_and_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "missing.pt", "pipe", "missing/model.pt", "x" * 500):
        path = tmp_path / name
        with refused(path):
            read_pt(path)
    with pytest.raises(OpenELMError):
        read_pt(tmp_path / "\0")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch before 1.6"),
        (pickle.dumps({"w": 1}), "not a file of torch.save"),
        (b"GGUF" * 100, "GGUF"),
        (zipped()[:-1], "truncated zip"),
        (b"PK\x05\x06" + bytes(18), "data.pkl"),
    ],
)
def test_other_files_are_recognised(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with refused(path, word):
        read_pt(path)


def test_torchs_old_format_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "old.pt"
    torch.save({"x": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    with refused(path, "current torch"):
        read_pt(path)


def test_zips_of_other_kinds_are_refused(
    file: Callable[..., Path], tmp_path: Path
) -> None:
    path = file(compression=zipfile.ZIP_DEFLATED)
    with refused(path, "compressed"):
        read_pt(path)
    path = file(records={"data/0": NUMBERS.tobytes(), "byteorder": b"big"})
    with refused(path, "big-endian"):
        read_pt(path)
    read_pt(file(records={"data/0": NUMBERS.tobytes(), "byteorder": b"little"}))
    np.savez(tmp_path / "x.npz", w=NUMBERS)
    with refused(tmp_path / "x.npz", "data.pkl", "w.npy"):
        read_pt(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0", "other/data/0"])
def test_duplicate_or_misplaced_records_are_refused(
    file: Callable[..., Path], name: str
) -> None:
    path = file()
    with zipfile.ZipFile(path, "a") as more:
        if name in more.namelist():
            with pytest.warns(UserWarning, match="Duplicate name"):
                more.writestr(name, b"")
        else:
            more.writestr(name, b"")
    with refused(path, name):
        read_pt(path)


@pytest.mark.parametrize(
    ("at", "wrong"),
    [
        *((0, b"QK"), (26, b"\x0d\0"), (26, b"\x0f\0"), (38, b"do")),
        *((28, b"\xff\xff"), (28, b"\4\0"), (28, b"\x18\0")),
    ],
)
def test_a_record_with_a_wrong_local_header_is_refused(
    file: Callable[..., Path], at: int, wrong: bytes
) -> None:
    path = file()
    content = bytearray(path.read_bytes())
    header = content.rindex(b"PK\x03\x04")  # of data/0
    content[header + at : header + at + 2] = wrong
    path.write_bytes(content)
    with refused(path, "data/0", "not where"):
        read_pt(path)


def test_two_tensors_of_one_name_are_refused(file: Callable[..., Path]) -> None:
    path = file(mapping(a=tensor(), b=tensor()).replace(plain("b"), plain("a")))
    with refused(path, "'a'"):
        read_pt(path)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"key": "1"}, "data/1"),
        ({"key": "../data.pkl"}, "data.pkl"),
        ({"length": 7}, "7 numbers"),
        ({"length": 10**30}, "too short"),
        ({"length": -1}, "storage"),
        ({"length": 5}, "5 numbers"),
        ({"length": True}, "True numbers"),
        ({"kind": "DoubleStorage"}, "float64"),
        ({"kind": "Size"}, "storage"),
        ({"offset": 1}, "exceeds"),
        ({"offset": -1}, "tensor"),
        ({"offset": 10**30}, "tensor"),
        ({"offset": "0"}, "tensor"),
        ({"shape": (2, 4)}, "exceeds"),
        ({"shape": (3, 3)}, "exceeds"),
        ({"shape": (2,)}, "tensor"),
        ({"shape": (2, -3)}, "tensor"),
        ({"shape": (2, 3.0)}, "tensor"),
        ({"shape": [2, 3]}, "call"),
        ({"shape": (2**40, 2**40), "strides": (0, 0)}, "larger"),
        ({"shape": (0, 2**49)}, "larger"),
        ({"shape": (1,) * 70, "strides": (1,) * 70}, "tensor"),
        ({"strides": (-3, 1)}, "tensor"),
        ({"strides": (4, 1)}, "exceeds"),
        ({"strides": (2**49, 2**49)}, "exceeds"),
        ({"strides": (2**63, 1)}, "tensor"),
    ],
)
def test_tensors_that_exceed_their_storage_are_refused(
    file: Callable[..., Path], wrong: dict[str, Any], word: str
) -> None:
    path = file(
        mapping(w=tensor(**wrong)), {"data/0": NUMBERS.tobytes(), "z": b"z" * 99}
    )
    with refused(path, word):
        read_pt(path)


def test_a_storage_without_a_tensor_is_refused(file: Callable[..., Path]) -> None:
    path = file(GOOD, {"data/0": NUMBERS.tobytes(), "data/1": NUMBERS.tobytes()})
    with refused(path, "'data/1' belongs to no tensor"):
        read_checkpoint(path)


@pytest.mark.parametrize("strides", [(0, 1), (1, 1), (3, 0), (2, 1), (1, 0)])
def test_tensors_with_overlapping_elements_are_refused(
    file: Callable[..., Path], strides: tuple[int, int]
) -> None:
    path = file(mapping(w=tensor(strides=strides)))
    with refused(path, "elements of 'w' overlap"):
        read_checkpoint(path)
    transposed = read_checkpoint(file(mapping(w=tensor(strides=(1, 2)))))
    transposed = transposed.tensors["w"].read()
    np.testing.assert_array_equal(transposed, NUMBERS.reshape(3, 2).T)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02.",
        b"\x80\x02}",
        b"\x80\x02t.",
        b"\x80\x02u.",
        b"\x80\x02(u.",
        b"\x80\x02}(Nu.",
        b"\x80\x02N\x86.",
        b"\x80\x02h\x00.",
        b"\x80\x02q\x00.",
        b"\x80\x02]Na.",
        b"\x80\x02Q.",
        b"\x80\x02R.",
        b"\x80\x02b.",
        b"\x80\x02N(s.",
        b"\x80\x02\xff.",
        b"\x80\x02X\x01\x00\x00\x00\xff.",
        b"\x80\x02ctorch\n",
        b"\x80\x02K\x01.",
        b"\x80\x02" + plain({1: 2}) + b".",
        b"\x80\x02" + tensor() + b".",
        b"(I1\n.",
    ],
)
def test_invalid_pickles_are_refused(file: Callable[..., Path], data: bytes) -> None:
    path = file(data)
    with refused(path):
        read_checkpoint(path)


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pt")


@pytest.fixture(name="written", scope="module", params=["by hand", "by torch"])
def _written(request: pytest.FixtureRequest) -> bytes:
    if request.param == "by hand":
        return zipped()
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    torch.save(torch.nn.Linear(2, 3).state_dict(), buffer)
    return buffer.getvalue()


def test_a_truncated_file_is_refused(folder: Path, written: bytes) -> None:
    path = folder / "short.pt"
    step = max(1, len(written) // 100)
    for length in {
        *range(0, len(written), step),
        *range(len(written) - 99, len(written)),
    }:
        path.write_bytes(written[:length])
        with refused(path):
            read_pt(path)


def read_or_refuse(path: Path) -> None:
    """Read all of a file, or catch an OpenELMError."""
    with suppress(OpenELMError):
        for tensor in read_checkpoint(path).tensors.values():
            tensor.read()


@given(data=st.data())
@settings(max_examples=120)
def test_flipped_bits_give_a_result_or_an_error(
    folder: Path, written: bytes, data: st.DataObject
) -> None:
    ends = st.one_of(
        st.integers(0, min(1023, len(written) - 1)),
        st.integers(max(0, len(written) - 1024), len(written) - 1),
    )
    flipped = bytearray(written)
    for at in data.draw(st.lists(ends, min_size=1, max_size=3)):
        flipped[at] ^= data.draw(st.integers(1, 255))
    path = folder / "flipped.pt"
    path.write_bytes(flipped)
    read_or_refuse(path)


OPCODES = [
    *(MARK, TUPLE, REDUCE, BUILD, EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE, SETITEM),
    *(b"u", b"a", APPENDS, b"\x85", b"\x86", b"\x87", b"N", b"\x88", b"K\x03", b"Q"),
    *(b"q\x00", b"q\x01", b"h\x00", b"h\x01", plain("w"), plain(0.5), storage()),
    *(ORDERED_DICT, b"ctorch\nSize\n", b"ctorch._utils\n_rebuild_parameter\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", tensor(), plain((2, 3)), b"0", b"2"),
]


@given(st.lists(st.sampled_from(OPCODES), max_size=30), st.booleans())
@settings(max_examples=250)
def test_any_sequence_of_opcodes_gives_a_result_or_an_error(
    folder: Path, opcodes: list[bytes], in_mapping: bool
) -> None:
    body = b"".join(opcodes)
    path = folder / "any.pt"
    data = mapping(w=body) if in_mapping else b"\x80\x02" + body + STOP
    path.write_bytes(zipped(data))
    read_or_refuse(path)
