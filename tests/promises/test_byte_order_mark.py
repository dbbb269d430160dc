"""The mark that Windows writes before UTF-8 is part of no text."""

import io
import sys

import pytest
from commands import call
from models import TEXT, UNEVEN, build, small_tokenizer

from converters.pretraining.packing import read_corpus
from converters.quantization.calibration import read_calibration
from mlx_openelm.cli.chat_session import _Lines
from mlx_openelm.evaluation.texts import evaluate
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.generation.prompt_file import read_prompts
from mlx_openelm.recipe_loader import load_recipe, read_recipe

MARK = b"\xef\xbb\xbf"
READERS = {
    "evaluate": lambda path: evaluate(build(UNEVEN), small_tokenizer(), text=path),
    "calibration": lambda path: read_calibration(path)[1],
    "prompts": lambda path: [p.content for p in read_prompts(path).prompts],
    "corpus": lambda path: list(read_corpus([str(path)]).documents),
    "recipe": lambda path: read_recipe(str(path)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_text_is_read_without_the_mark(tmp_path, reader):
    read, data = READERS[reader], TEXT[:300].encode()
    plain, marked = tmp_path / "a.txt", tmp_path / "b.txt"
    plain.write_bytes(data)
    marked.write_bytes(MARK + data)
    assert read(marked) == read(plain)


def test_a_recipe_is_loaded_without_the_mark(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(MARK + b"data: d.jsonl\n")
    assert load_recipe(FinetuneRecipe, str(path), {}).data == "d.jsonl"


def test_stdin_is_read_without_the_mark(monkeypatch):
    answers = [
        call("generate", "-m", 2, "--temp", 0, "--quiet", input=start + b"The king")
        for start in (b"", MARK)
    ]
    assert answers[0].exit_code == 0
    assert answers[0].stdout == answers[1].stdout
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(MARK + b"Hi\r\nyou")))
    lines = _Lines()
    assert [lines.read(">"), lines.read(">")] == ["Hi", "you"]
