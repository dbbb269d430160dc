"""Runs the command line in this process and checks its errors."""

import re
from pathlib import Path

import numpy as np
from models import UNEVEN, small_tokenizer, weights_of, write_hugging_face
from typer.testing import CliRunner, Result

from mlx_openelm.cli.main import app
from mlx_openelm.config import OpenELMConfig


def call(*args: object, **options) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], **options)


def expect_error(here: Path, *args: object, message: str | list[str], **options) -> str:
    """Run; expect an error with all parts of `message` and unchanged files.

    Return stderr, which must be one sentence.
    """
    before = snapshot(here)
    result = call(*args, **options)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"error: \S.*\.\n", result.stderr), result.stderr
    for words in [message] if isinstance(message, str) else message:
        assert words in result.stderr, result.stderr
    assert snapshot(here) == before
    return result.stderr


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def make_source(
    folder: Path,
    changes: dict[str, np.ndarray | None] | None = None,
    *,
    config: OpenELMConfig = UNEVEN,
) -> Path:
    """Write a folder to convert, with `changes` to its weights; None removes one."""
    weights = weights_of(config) | (changes or {})
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    write_hugging_face(folder, config, weights)
    (folder / "tokenizer.model").write_bytes(small_tokenizer().model_proto)
    return folder


def replace_last(weight: np.ndarray, value: float) -> np.ndarray:
    weight = weight.copy()
    weight[-1, -1] = value
    return weight
