"""Runs the command line in this process and checks its errors."""

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import typer
from models import UNEVEN, small_tokenizer, weights_of, write_hugging_face
from typer.testing import CliRunner, Result

from mlx_openelm.cli.main import app
from mlx_openelm.config import OpenELMConfig


@cache
def program() -> Any:
    """The command line; `CliRunner.invoke` builds its commands for each call."""
    return typer.main.get_command(app)


def call(
    *args: object, input: str | bytes | None = None, env: dict[str, str] | None = None
) -> Result:
    code, exception, runner = 0, None, CliRunner()
    with runner.isolation(input=input, env=env) as outputs:
        try:
            program().main(args=[str(arg) for arg in args], prog_name="mlx-openelm")
        except SystemExit as ended:
            code = ended.code or 0
            exception = ended if code else None
        except Exception as error:
            code, exception = 1, error
        sys.stdout.flush()
        sys.stderr.flush()
        written = [output.getvalue() for output in outputs]
    return Result(runner, *written, None, code, exception)


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
