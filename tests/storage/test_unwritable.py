"""A run in a folder that cannot be written is refused with the name of its target."""

import json
import os

import pytest
from commands import expect_error

from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.staging import lock_target


def test_a_target_in_a_folder_that_is_not_writable_is_named(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise PermissionError(13, "Permission denied", "adapters")

    monkeypatch.setattr(os, "mkdir", fail)  # permissions do not stop root
    with (
        pytest.raises(OpenELMError, match=r"Cannot write .*adapters/d: Permission"),
        lock_target(tmp_path / "adapters" / "d"),
    ):
        pass


def test_lora_names_the_folder_that_it_cannot_write(tmp_path, monkeypatch):
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    monkeypatch.chdir(tmp_path)
    expect_error(
        *(tmp_path, "lora", "--data", "d.jsonl", "--adapter-path", "d.jsonl/run"),
        message="Cannot write d.jsonl/run: ",
    )


@pytest.mark.parametrize("path", ["d.txt/grown", "d.txt/deeper/grown"])
def test_a_file_in_place_of_a_folder_is_named(tmp_path, monkeypatch, path):
    (tmp_path / "d.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    message = f"error: Cannot write {path}: d.txt is not a folder; choose another path."
    expect_error(
        *(tmp_path, "convert", "demo", "--mlx-path", path, "--quiet"), message=message
    )


def test_an_error_while_the_target_is_locked_is_not_changed(tmp_path):
    with pytest.raises(OSError, match="of the body"), lock_target(tmp_path / "run"):
        raise OSError("of the body")
