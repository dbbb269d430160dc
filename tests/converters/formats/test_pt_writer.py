"""Files in torch.save's format, written without torch and read by it bit for bit."""

import io
import tracemalloc
import zipfile
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from converters.formats.pt_reader import read_checkpoint
from converters.formats.pt_writer import ALIGNMENT, TensorToWrite, to_numpy, write_pt

NAMES = [
    *("layers.0.attn.qkv_proj.weight", "", " ", "a/b\\c", "../x", "x" * 300),
    *("é 日本 \U0001f642", "two\nlines\0", "%s{}", "half \ud83d", "data/0", "1"),
]
SHAPES = [(), (1,), (70,), (3, 5), (2, 3, 4), (0,), (4, 0), (1, 1)]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def to_write(array: mx.array) -> TensorToWrite:
    return TensorToWrite(array.shape, array.dtype, lambda: array)


def write(path: Path, arrays: Mapping[str, mx.array]) -> Path:
    write_pt(path, {name: to_write(array) for name, array in arrays.items()})
    return path


def random_bits(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    """Return random bits, including NaN payloads, infinity and subnormal numbers."""
    count = int(np.prod(shape)) * dtype.size
    drawn = np.random.default_rng(seed).integers(0, 256, count, np.uint8)
    if not count:
        return mx.zeros(shape, dtype)
    return mx.array(drawn).view(dtype).reshape(shape)


def bits(array: mx.array) -> bytes:
    return to_numpy(array).tobytes()


@pytest.fixture(name="arrays", scope="module")
def _arrays() -> dict[str, mx.array]:
    kinds = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    names = [*NAMES, *(f"t{i}" for i in range(len(kinds) - len(NAMES)))]
    return {
        name: random_bits(shape, dtype, i)
        for i, (name, (shape, dtype)) in enumerate(zip(names, kinds, strict=True))
    }


@pytest.fixture(name="written", scope="module")
def _written(
    arrays: dict[str, mx.array], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return write(tmp_path_factory.mktemp("pt") / "model.pt", arrays)


def assert_torch_reads(path: Path, arrays: Mapping[str, mx.array]) -> None:
    torch = pytest.importorskip("torch")
    for mapped in (False, True):
        read = torch.load(path, weights_only=True, mmap=mapped)
        assert type(read) is dict
        assert list(read) == list(arrays)
        for name, array in arrays.items():
            theirs = read[name]
            assert f"mlx.core.{theirs.dtype}".replace("torch.", "") == str(array.dtype)
            assert tuple(theirs.shape) == array.shape
            assert theirs.is_contiguous()
            assert not theirs.requires_grad
            plain = theirs.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert plain == bits(array), name


def test_torch_reads_every_dtype_shape_and_name_mapped_or_not(
    arrays: dict[str, mx.array], written: Path
) -> None:
    assert_torch_reads(written, arrays)


def test_pt_reader_reads_the_same_bits(
    arrays: dict[str, mx.array], written: Path
) -> None:
    read = read_checkpoint(written).tensors
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert f"mlx.core.{read[name].dtype}" == str(array.dtype)
        assert read[name].shape == array.shape
        assert read[name].read().tobytes() == bits(array)


def test_the_zip_has_torchs_layout(written: Path) -> None:
    torch = pytest.importorskip("torch")
    saved = io.BytesIO()
    count = len(read_checkpoint(written).tensors)
    torch.save({str(i): torch.zeros(1) for i in range(count)}, saved)
    with zipfile.ZipFile(saved) as theirs, zipfile.ZipFile(written) as ours:
        names = [n for n in theirs.namelist() if "serialization_id" not in n]
        assert ours.namelist() == names
        for name in names:
            if "/data" not in name:
                assert ours.read(name) == theirs.read(name), name
        assert ours.testzip() is None  # every record has its checksum
        assert {info.compress_type for info in ours.infolist()} == {zipfile.ZIP_STORED}


def test_every_record_is_aligned_to_64_bytes(written: Path) -> None:
    torch = pytest.importorskip("torch")
    reader = torch._C.PyTorchFileReader(str(written))
    for name in reader.get_all_records():
        assert reader.get_record_offset(name) % ALIGNMENT == 0, name


def test_strided_views_are_written_in_row_order(tmp_path: Path) -> None:
    base = random_bits((6, 8), mx.bfloat16, 1)
    views = {"t": base.T, "rows": base[2:4], "column": base[:, 3], "step": base[::2]}
    path = write(tmp_path / "views.pt", views)
    assert_torch_reads(path, views)
    read = read_checkpoint(path).tensors
    np.testing.assert_array_equal(read["t"].read(), to_numpy(base).T)


def test_the_same_tensors_give_the_same_bytes_under_any_name(
    arrays: dict[str, mx.array], written: Path, tmp_path: Path
) -> None:
    other = write(tmp_path / ".é x.pt.part", arrays)
    assert other.read_bytes() == written.read_bytes()


def test_torch_reads_zip64_files(
    arrays: dict[str, mx.array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("ZIP64_LIMIT", "ZIP_FILECOUNT_LIMIT"):
        monkeypatch.setattr(zipfile, limit, 1)  # use 64-bit sizes and offsets
    path = write(tmp_path / "big.pt", arrays)
    assert b"PK\x06\x06" in path.read_bytes()
    assert_torch_reads(path, arrays)


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    events, shape = [], (1024, 1024)

    def reader(i: int) -> TensorToWrite:
        def read() -> mx.array:
            events.append(f"read {i}")
            return mx.full(shape, i, mx.float32)

        return TensorToWrite(shape, mx.float32, read)

    tensors = {str(i): reader(i) for i in range(6)}
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    try:
        write_pt(
            tmp_path / "x.pt",
            tensors,
            on_written=lambda name: events.append(f"wrote {name}"),
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert events == [f"{action} {i}" for i in range(6) for action in ("read", "wrote")]
    assert mx.get_peak_memory() - before < 1.5 * 2**22
    assert peak < 2**20  # no copies
    assert read_checkpoint(tmp_path / "x.pt").tensors["5"].read()[-1, -1] == 5


def test_an_array_that_differs_from_its_declaration_is_refused(tmp_path: Path) -> None:
    for array in (mx.zeros((3, 2)), mx.zeros((2, 3), mx.float16)):
        wrong = TensorToWrite((2, 3), mx.float32, lambda array=array: array)
        with pytest.raises(ValueError, match="w was declared as"):
            write_pt(tmp_path / "x.pt", {"w": wrong})


@pytest.mark.proof
def test_a_file_of_five_gigabytes_is_read_by_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    shape, path = (2**14, 2**14), tmp_path / "big.pt"  # 1 GB each

    def reader(i: int) -> TensorToWrite:
        return TensorToWrite(shape, mx.float32, lambda: mx.full(shape, i, mx.float32))

    mx.reset_peak_memory()
    write_pt(path, {str(i): reader(i) for i in range(5)})
    assert mx.get_peak_memory() < 1.5 * 2**30
    assert path.stat().st_size > 5 * 2**30
    read = torch.load(path, weights_only=True, mmap=True)
    ours = read_checkpoint(path).tensors
    for i in range(5):
        assert read[str(i)][-1, -1] == read[str(i)][0, 0] == i
        assert ours[str(i)].read()[-1, -1] == i
    path.unlink()  # pytest keeps its folders
