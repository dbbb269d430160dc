"""A file that cannot be opened is one sentence with its path and what to do."""

import builtins
import io
import os
import shutil
from pathlib import Path

import pytest
from commands import call, expect_error

import mlx_openelm
from mlx_openelm.mapping_files import read_mapping

DEMO = Path(mlx_openelm.__file__).parent / "demo"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
HINT = "permission denied; change its permissions."


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DEMO, tmp_path / "model")


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """A path that may not be read, as far as its user is concerned (also root)."""
    path = tmp_path / "closed"
    path.mkdir()

    def deny(function):
        def denied(name, *arguments, **options):
            if str(name).startswith(str(path)):
                raise PermissionError(13, "Permission denied", str(name))
            return function(name, *arguments, **options)

        return denied

    for name in ("stat", "lstat", "listdir", "scandir"):
        monkeypatch.setattr(os, name, deny(getattr(os, name)))
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", deny(module.open))
    return path / "it"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "Hi", "--model"),
        ("generate", "Hi", "--adapter-path"),
        ("convert",),
        ("convert", "demo", "--mlx-path", "made", "--tokenizer"),
        ("verify",),
        ("inspect",),
        ("lora", "--data"),
        ("evaluate", "--tasks"),
        ("fuse", "--save-path", "made", "--adapter-path"),
    ],
)
def test_a_path_that_may_not_be_read_is_named_with_the_advice(
    tmp_path, monkeypatch, closed, arguments
):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments, closed)
    assert result.exit_code == 1
    assert result.stderr.endswith(HINT + "\n")
    assert "Errno" not in result.stderr
    assert str(closed) in result.stderr


def test_a_name_that_is_too_long_is_an_error_without_a_number(tmp_path):
    result = call("evaluate", "--tasks", tmp_path / ("a" * 300))
    assert result.exit_code == 1
    assert "file name too long" in result.stderr
    assert "Errno" not in result.stderr


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (POINTER, "is a Git LFS pointer"),
        (b"<!DOCTYPE html>\n", "is a web page"),
        ("{}".encode("utf-16"), "is not UTF-8 but UTF-16"),
        ("{}".encode("utf-16-le"), "is not UTF-8 but UTF-16"),
    ],
)
def test_a_placeholder_in_place_of_a_json_file_is_named(
    tmp_path, folder, name, data, message
):
    (folder / name).write_bytes(data)
    for command in (("verify",), ("generate", "Hi", "--quiet", "--model")):
        expect_error(tmp_path, *command, folder, message=message)


@pytest.mark.parametrize(
    ("data", "message"),
    [(POINTER, "is a Git LFS pointer"), (b"\xff\xfe{\0", "is not UTF-8 but UTF-16")],
)
def test_verify_names_what_is_in_place_of_tokenizer_json(folder, data, message):
    (folder / "tokenizer.json").write_bytes(data)
    result = call("verify", folder)
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_byte_order_mark_is_skipped_in_all_json_files(folder):
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        path = Path(folder, name)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert read_mapping(path)
    assert call("verify", folder).exit_code == 0


def test_a_pointer_in_place_of_data_is_not_read_as_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(POINTER)
    result = call("generate", "--prompts-file", path, "--json")
    assert result.exit_code == 1
    assert "is a Git LFS pointer" in result.stdout + result.stderr
    expect_error(tmp_path, "evaluate", "--text", path, message="is a Git LFS pointer")
