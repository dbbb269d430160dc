"""A folder is written whole or not at all, and nothing that was there is lost."""

import os
import shutil

import numpy as np
import pytest
from commands import call, make_source, refuse, snapshot

from mlx_openelm import staging
from mlx_openelm.checkpoint import open_folder
from mlx_openelm.errors import OpenELMError
from mlx_openelm.staging import staged_folder

CONVERT = ("convert", "source", "--quiet")


def a_project(folder):
    """Files as a person may have them, beside a config.json that is no model's."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "package.json").write_text("{}")


def notes_in_a_model(folder):
    shutil.copytree("model", folder)
    (folder / "thesis.txt").write_text("a year's work")


def a_folder_in_a_model(folder):
    shutil.copytree("model", folder)
    (folder / "thesis").mkdir()


def a_link_to_a_model(folder):
    folder.symlink_to("model")


def a_link_to_nothing(folder):
    folder.symlink_to("nowhere")


def a_file(path):
    path.write_text("a year's work")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (a_file, "is not a model or adapter folder"),
        (a_project, "is not a model or adapter folder"),
        (a_link_to_a_model, "is not a model or adapter folder"),
        (a_link_to_nothing, "is not a model or adapter folder"),
        (notes_in_a_model, "holds thesis.txt"),
        (a_folder_in_a_model, "holds thesis"),
    ],
)
def test_what_is_no_model_is_never_replaced(here, make, reason):
    make(here / "out")
    args = (*CONVERT, "--mlx-path", "out")
    refuse(here, *args, says=["out exists already", "--force"])
    refuse(here, *args, "--force", says=[f"out {reason}", "remove it yourself"])
    assert os.path.lexists("out")


def test_a_model_is_replaced_when_that_is_said(here):
    args = (*CONVERT, "--mlx-path", "model", "--tokenizer", "none")
    refuse(here, *args, says=["model exists already", "--force"])
    (here / "model" / ".DS_Store").write_text("the Finder's")
    ran = call(*args, "--force")
    assert (ran.exit_code, ran.stdout) == (0, "model\n")
    assert not (here / "model" / "tokenizer.model").exists()  # all is new
    assert open_folder(here / "model")
    assert sorted(path.name for path in here.iterdir()) == ["model", "source"]


def test_an_empty_folder_is_filled_when_that_is_said(here):
    (here / "out").mkdir()
    args = (*CONVERT, "--mlx-path", "out")
    refuse(here, *args, says="out exists already")
    assert call(*args, "--force").exit_code == 0
    assert open_folder(here / "out")


def test_a_failed_replacement_leaves_the_old_model(here):
    make_source(here / "odd", {"norm.weight": np.full(64, np.nan, "f")})
    args = ("convert", "odd", "--mlx-path", "model", "--force")
    refuse(here, *args, says="norm.weight holds NaN")


def test_force_never_loses_the_source(here):
    args = ("convert", "source", "--force", "--mlx-path")
    refuse(here, *args, "source", says="source holds the source itself")
    refuse(here, *args, str(here / "model" / ".." / "source"), says="the source itself")
    (here / "link").symlink_to("source")
    refuse(here, "convert", "link", *args[2:], "source", says="the source itself")
    make_source(here / "model" / "inner")
    inner = ("convert", "model/inner", "--force", "--mlx-path", "model")
    refuse(here, *inner, says="model holds")


@pytest.mark.parametrize("name", ["mit Leerzeichen", "日本/ü.model", "-x", "a/b/c/d"])
def test_any_name_and_depth_of_target_is_made(here, name):
    (here / "a").mkdir()
    ran = call(*CONVERT, f"--mlx-path={name}")
    assert (ran.exit_code, ran.stdout) == (0, f"{name}\n")
    assert open_folder(here / name)
    assert not list(here.rglob("*.part"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("source/config.json", "source/config.json exists already"),
        ("source/config.json/out", "source/config.json"),
        ("source/config.json/a/b", "source/config.json"),
        ("x" * 250, "Cannot write"),
        ("x" * 300, "name too long"),
        (".", ". exists already"),
        ("", ". exists already"),
    ],
)
def test_a_target_that_cannot_be_is_named(here, name, says):
    refuse(here, *CONVERT, "--mlx-path", name, says=says)


def test_a_target_that_comes_while_we_write_is_not_lost(here):
    def write_and_be_overtaken():
        with staged_folder(here / "new"):
            (here / "new").mkdir()
            (here / "new" / "thesis.txt").write_text("a year's work")

    with pytest.raises(OpenELMError, match="exists already"):
        write_and_be_overtaken()
    assert (here / "new" / "thesis.txt").read_text() == "a year's work"
    assert sorted(path.name for path in here.iterdir()) == ["model", "new", "source"]


@pytest.mark.parametrize("error", [OSError("stale"), KeyboardInterrupt()])
def test_without_an_exchange_of_names_the_old_one_comes_back(here, monkeypatch, error):
    """The file system cannot exchange names, and the second renaming fails."""
    before = snapshot(here)
    rename = staging.Path.rename

    def fail(self, target):
        if self.suffix == ".part":
            raise error
        return rename(self, target)

    monkeypatch.setattr(staging, "_exchange", lambda a, b: False)
    monkeypatch.setattr(staging.Path, "rename", fail)
    with (
        pytest.raises((OpenELMError, KeyboardInterrupt)),
        staged_folder(here / "model", force=True) as folder,
    ):
        (folder / "config.json").write_text("{}")
    assert snapshot(here) == before


def test_a_second_ctrl_c_does_not_leave_the_hidden_folder(here, monkeypatch):
    before = snapshot(here)
    rmtree = shutil.rmtree
    calls = iter([KeyboardInterrupt])

    def interrupted(path, **options):
        for error in calls:
            raise error
        rmtree(path, **options)

    def write_and_stop(target):
        with staged_folder(target) as folder:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    monkeypatch.setattr(staging.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_and_stop(here / "a" / "b")
    assert snapshot(here) == before


def test_a_folder_is_readable_as_the_umask_says(here):
    old = os.umask(0o022)
    try:
        with staged_folder(here / "new") as folder:
            (folder / "config.json").write_text("{}")
    finally:
        os.umask(old)
    assert (here / "new").stat().st_mode & 0o777 == 0o755
