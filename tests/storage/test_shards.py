"""Shards are streamed, readable by other libraries, and written once."""

import hashlib
import itertools
import json
import math
import os
import resource
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from safetensors import safe_open

from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.shards import (
    DTYPES,
    INDEX,
    ShardWriter,
    TensorLayout,
    plan_shards,
    write_json,
)
from mlx_openelm.storage.staging import staged_folder

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (64, 64)]


def make_arrays() -> dict[str, mx.array]:
    """Random bits of every dtype, including NaN; only the first is aligned."""
    random = np.random.default_rng(0)
    arrays = {}
    for spelling, dtype in reversed(DTYPES.items()):
        for shape in SHAPES:
            bits = random.bytes(math.prod(shape) * dtype.size)
            array = mx.array(np.frombuffer(bits, "u1")).view(dtype).reshape(shape)
            arrays[f"layers.{spelling}.{len(arrays)}"] = array
    return arrays


def layout_of(arrays):
    return {name: TensorLayout(a.dtype, a.shape) for name, a in arrays.items()}


def write(folder, arrays, **options):
    """Write the tensors that are not in complete shards; return the writer."""
    with ShardWriter(folder, layout_of(arrays), **options) as writer:
        for name, array in arrays.items():
            if name not in writer.whole:
                writer.add(name, array)
        writer.close(123)
    return writer


def bits(array):
    return bytes(memoryview(array.flatten().view(mx.uint8)))


def state_of(folder):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


# Contents ------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
def test_mlx_and_safetensors_read_every_bit_back(tmp_path, shard_bytes):
    arrays = make_arrays()
    write(tmp_path, arrays, shard_bytes=shard_bytes)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert (len(set(weight_map.values())) > 1) == (shard_bytes == 5000)
    by_mlx = {}
    for file in set(weight_map.values()):
        by_mlx |= mx.load(str(tmp_path / file))
    for name, array in arrays.items():
        loaded = by_mlx[name]
        assert (loaded.dtype, loaded.shape) == (array.dtype, array.shape)
        assert bits(loaded) == bits(array)
        with safe_open(tmp_path / weight_map[name], framework="numpy") as opened:
            assert opened.metadata() == {"format": "mlx"}
            part = opened.get_slice(name)
            assert DTYPES[part.get_dtype()] == array.dtype
            assert tuple(part.get_shape()) == array.shape
            if array.dtype != mx.bfloat16:  # which numpy lacks
                assert opened.get_tensor(name).tobytes() == bits(array)


def test_pytorch_reads_every_bit_back(tmp_path):
    torch = pytest.importorskip("torch", reason="reads bfloat16 and uint32")
    arrays = make_arrays()
    write(tmp_path, arrays, format="pt")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, array in arrays.items():
            tensor = opened.get_tensor(name).reshape(-1).view(torch.uint8)
            assert tensor.numpy().tobytes() == bits(array)


def test_arrays_with_any_strides_are_written_in_row_major_order(tmp_path):
    base = mx.arange(24, dtype=mx.float32).reshape(4, 6)
    for name, dtype in DTYPES.items():
        a = base.astype(dtype)
        arrays = {"turned": a.T, "cut": a[1:3, 2:5], "spread": mx.zeros(3, dtype)[None]}
        (tmp_path / name).mkdir()
        write(tmp_path / name, arrays)
        loaded = mx.load(str(tmp_path / name / "model.safetensors"))
        assert loaded.keys() == arrays.keys()
        assert all(mx.array_equal(loaded[n], arrays[n]) for n in arrays)


def test_index_and_hashes_match_the_files(tmp_path):
    arrays = make_arrays()
    writer = write(tmp_path, arrays, shard_bytes=5000)
    index = json.loads((tmp_path / INDEX).read_text())
    total = sum(array.nbytes for array in arrays.values())
    assert index["metadata"] == {"total_parameters": 123, "total_size": total}
    assert index["weight_map"].keys() == arrays.keys()
    files = {*index["weight_map"].values()}
    assert {path.name for path in tmp_path.iterdir()} == files | {INDEX}
    assert writer.hashes == {
        name: f"sha256:{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}"
        for name in files
    }


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.integers(1, 120),
)
def test_shards_hold_every_tensor_once_in_order_and_keep_the_size_limit(sizes, most):
    layout = {f"t{i}": TensorLayout(mx.uint8, (n,)) for i, n in enumerate(sizes)}
    shards = plan_shards(layout, most)
    assert [item for shard in shards for item in shard.tensors.items()] == [
        *layout.items()
    ]
    count = len(shards)
    for i, shard in enumerate(shards, start=1):
        assert shard.num_bytes <= most or len(shard.tensors) == 1
        numbered = f"model-{i:05d}-of-{count:05d}.safetensors"
        assert shard.name == ("model.safetensors" if count == 1 else numbered)
    for one, following in itertools.pairwise(shards):
        first = next(iter(following.tensors.values()))
        assert one.num_bytes + first.num_bytes > most  # it was full


# Resuming ------------------------------------------------------------------------


def cut_short(path):
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip_a_bit_of_the_header(path):
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)


def put_a_link_there(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "damage", [cut_short, lengthen, flip_a_bit_of_the_header, put_a_link_there]
)
def test_complete_shards_are_kept_and_a_damaged_one_is_written_again(tmp_path, damage):
    arrays = make_arrays()
    first = write(tmp_path, arrays, shard_bytes=5000)
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert not first.whole
    names = sorted(first.hashes)
    damage(tmp_path / names[1])
    before = state_of(tmp_path)
    second = write(tmp_path, arrays, shard_bytes=5000)
    assert len(second.whole) == len(arrays) - sum(
        file == names[1] for file in json.loads(content[INDEX])["weight_map"].values()
    )
    (tmp_path / "elsewhere").unlink(missing_ok=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == content
    assert not any(path.is_symlink() for path in tmp_path.iterdir())
    assert second.hashes == first.hashes
    after = state_of(tmp_path)
    assert all(after[n] == before[n] for n in names if n != names[1])


@pytest.mark.parametrize("what", ["dtype", "shape", "name", "format", "shard_bytes"])
def test_shards_of_another_plan_are_not_kept(tmp_path, what):
    arrays = {f"t{i}": mx.full((4, 8), i, mx.float16) for i in range(4)}
    write(tmp_path, arrays, shard_bytes=128)
    options = {"shard_bytes": 128}
    match what:
        case "dtype":
            arrays = {name: a.astype(mx.bfloat16) for name, a in arrays.items()}
        case "shape":
            arrays = {name: a.reshape(8, 4) for name, a in arrays.items()}
        case "name":
            arrays = {f"s{i}": a for i, a in enumerate(arrays.values())}
        case "format":
            options["format"] = "pt"
        case "shard_bytes":
            options["shard_bytes"] = 1000
    writer = write(tmp_path, arrays, **options)
    assert not writer.whole
    loaded = {}
    for path in tmp_path.glob("*.safetensors"):
        loaded |= mx.load(str(path))
    assert loaded.keys() == arrays.keys()
    assert all(a.dtype == loaded[n].dtype for n, a in arrays.items())
    assert {p.name for p in tmp_path.iterdir()} == {INDEX, *writer.hashes}


def test_a_shard_has_its_final_name_only_when_complete(tmp_path):
    arrays = {f"t{i}": mx.full(1000, i, mx.uint8) for i in range(4)}
    with ShardWriter(tmp_path, layout_of(arrays), shard_bytes=2000) as writer:
        for name in ("t0", "t1", "t2"):
            writer.add(name, arrays[name])
    assert [path.name for path in tmp_path.glob("model*.safetensors")] == [
        "model-00001-of-00002.safetensors"
    ]
    assert write(tmp_path, arrays, shard_bytes=2000).whole == {"t0", "t1"}


# Errors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"b": mx.ones(2)}, "b came where the layout has a"),
        ({"a": mx.ones(3)}, "a is TensorLayout"),
        ({"a": mx.ones(2, mx.float16)}, "a is TensorLayout"),
        ({"a": mx.ones(2)}, "b of the layout was not added"),
        ({"a": mx.ones(2), "b": mx.ones(2), "c": mx.ones(2)}, "c came where"),
    ],
)
def test_tensors_that_differ_from_the_layout_are_refused(tmp_path, tensors, message):
    def write_others():
        layout = layout_of({"a": mx.ones(2), "b": mx.ones(2)})
        with ShardWriter(tmp_path, layout) as writer:
            for name, array in tensors.items():
                writer.add(name, array)
            writer.close(4)

    with pytest.raises(ValueError, match=message):
        write_others()
    assert not (tmp_path / INDEX).exists()


@pytest.mark.parametrize("limit", [1000, 150_000, 390_000])
def test_a_write_error_is_one_sentence_and_nothing_is_kept(tmp_path, limit):
    arrays = {f"t{i}": mx.ones((100, 250)) for i in range(4)}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with (
            pytest.raises(OpenELMError, match=r"Cannot write .*out: .*too large\.$"),
            staged_folder(tmp_path / "out", job={}) as folder,
        ):
            write(folder, arrays)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not list(tmp_path.iterdir())


STREAM = """
import resource, sys
from pathlib import Path
import mlx.core as mx
from mlx_openelm.storage.shards import ShardWriter, TensorLayout

def peak():  # bytes; macOS counts bytes, Linux KiB
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024

layout = {f"t{i}": TensorLayout(mx.bfloat16, (2048, 2048)) for i in range(64)}
mx.set_cache_limit(0)
before = peak()
with ShardWriter(Path(sys.argv[1]), layout) as writer:
    for name, tensor in layout.items():
        writer.add(name, mx.ones(tensor.shape, tensor.dtype))
    writer.close(1)
print((peak() - before) // 2**20, mx.get_peak_memory() // 2**20)
"""


def test_no_more_than_a_few_tensors_are_in_memory(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", STREAM, tmp_path],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    resident, allocated = map(int, result.stdout.split())
    size = 8
    assert (tmp_path / "model.safetensors").stat().st_size > 64 * size * 2**20
    assert allocated <= 4 * size
    assert resident <= 8 * size  # includes growth of the interpreter


def test_json_is_written_as_mlx_lm_writes_it(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1], "a": None})
    assert (tmp_path / "a.json").read_text() == (
        '{\n    "a": null,\n    "b": [\n        1\n    ]\n}\n'
    )
