"""Source files that are damaged, unreadable, or change while they are read."""

import io
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors
from commands import expect_error, make_source
from models import UNEVEN, weights_of, write_pt
from pickles import NUMBERS, mapping, tensor, zipped
from safetensors.numpy import save_file

from converters.formats.pt_reader import read_state_dict
from converters.formats.sources import open_path
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.weight_reader import read_headers

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_source_that_is_truncated_while_it_is_read_is_reported(tmp_path, kind):
    """A process of its own, as a mapped file would end it with SIGBUS."""
    if kind == "pt":
        path = tmp_path / "model.pt"
        path.write_bytes(
            zipped(
                mapping(w=tensor(shape=(2**20,), strides=(1,), length=2**20)),
                {"data/0": bytes(2**22)},
            )
        )
        read = "from converters.formats.pt_reader import read_state_dict as read"
    else:
        path = tmp_path / "model.safetensors"
        save_file({"w": np.zeros(2**20, np.float32)}, path)
        read = "from mlx_openelm.storage.weight_reader import read_headers"
        read += "; read = lambda path: read_headers([path])"
    script = (
        f"import os, sys, pathlib\n{read}\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "tensors = read(path)\n"
        "os.truncate(path, 4096)\n"
        "tensors['w'].read()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True
    )
    assert result.returncode == 1, result
    assert "was changed or truncated while it was being read" in result.stderr


def test_a_model_that_is_truncated_while_it_loads_is_reported(tmp_path, monkeypatch):
    from mlx_openelm.storage.loading import load_model
    from mlx_openelm.storage.model_folder import ModelFolder, open_folder

    folder = open_folder(make_source(tmp_path / "source"))
    read = ModelFolder.read

    def truncate_after(opened):
        arrays = read(opened)  # lazy
        os.truncate(tmp_path / "source" / "model.safetensors", 9000)
        return arrays

    monkeypatch.setattr(ModelFolder, "read", truncate_after)
    with pytest.raises(OpenELMError, match="changed or truncated while"):
        load_model(folder)


def test_every_flipped_bit_of_the_numbers_is_noticed(tmp_path):
    content = bytearray(zipped())
    start = bytes(content).index(NUMBERS.tobytes())
    path = tmp_path / "model.pt"
    for at in range(NUMBERS.nbytes):
        content[start + at] ^= 1 << at % 8
        path.write_bytes(content)
        tensors = read_state_dict(path)
        with pytest.raises(OpenELMError, match="'data/0' does not match its checksum"):
            tensors["w"].read()
        content[start + at] ^= 1 << at % 8


def test_a_flipped_bit_is_noticed_outside_of_the_first_view(tmp_path):
    """A view is a part of its storage; the checksum is that of the whole."""
    content = bytearray(zipped(mapping(w=tensor(shape=(2,), strides=(1,)))))
    content[bytes(content).index(NUMBERS.tobytes()) + 20] ^= 1
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(OpenELMError, match="does not match its checksum"):
        read_state_dict(tmp_path / "model.pt")["w"].read()


def test_a_flipped_bit_of_the_pickle_is_noticed(tmp_path):
    content = zipped(mapping(weight=tensor())).replace(b"weight", b"weighu")
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(OpenELMError, match=r"'data\.pkl' does not match its checksum"):
        read_state_dict(tmp_path / "model.pt")


def test_files_that_torch_wrote_without_checksums_are_read(tmp_path):
    buffer = io.BytesIO(zipped())
    with zipfile.ZipFile(buffer) as archive:
        crcs = [entry.CRC.to_bytes(4, "little") for entry in archive.infolist()]
    content = buffer.getvalue()
    for crc in crcs:
        content = content.replace(crc, bytes(4))
    (tmp_path / "model.pt").write_bytes(content)
    read = read_state_dict(tmp_path / "model.pt")["w"].read()
    np.testing.assert_array_equal(read.ravel(), NUMBERS)


def test_a_header_is_parsed_once_for_all_tensors(tmp_path, monkeypatch):
    folder = make_source(tmp_path / "source")
    parsed, safe_open = [], safetensors.safe_open

    def count(path, **options):
        parsed.append(path)
        return safe_open(path, **options)

    monkeypatch.setattr(safetensors, "safe_open", count)
    source = open_path(folder)
    for stored in source.tensors.values():
        stored.read()
    assert len(parsed) == 1


@pytest.mark.parametrize(
    ("start", "message"),
    [(POINTER, "is a Git LFS pointer"), (b"<!DOCTYPE html>\n", "is a web page")],
)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "a.pt"])
def test_a_placeholder_is_named_as_such(here, name, start, message):
    file = here / "source" / name
    file.write_bytes(start)
    given = f"source/{name}" if name == "a.pt" else "source"
    expect_error(here, "convert", given, message=[f"{name} {message}", "download the"])
    if name != "a.pt":
        expect_error(
            here, "generate", "Hi", "--model", "source", message=f"{name} {message}"
        )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "a.pt"])
def test_a_file_without_permission_is_not_called_damaged(here, name):
    file = here / "source" / name
    if name == "a.pt":
        write_pt(file, weights_of(UNEVEN))
    file.chmod(0)
    given = f"source/{name}" if name == "a.pt" else "source"
    try:
        result = refuse_unread(given)
    finally:
        file.chmod(0o600)
    assert "permission denied" in result
    assert "damaged" not in result


def refuse_unread(given: str) -> str:
    from commands import call

    result = call("convert", given, "--mlx-path", "made")
    assert result.exit_code == 1
    return result.stderr


def test_an_unreadable_file_is_not_called_damaged(tmp_path, monkeypatch):
    """As above, for root, who may read every file."""
    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros(3, np.float32)}, path)
    opened = type(path).open

    def deny(self, *args, **options):
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(self, *args, **options)

    monkeypatch.setattr(type(path), "open", deny)
    for read in (lambda: read_headers([path]), lambda: read_state_dict(path)):
        with pytest.raises(OpenELMError, match="permission denied") as caught:
            read()
        assert "damaged" not in str(caught.value)
