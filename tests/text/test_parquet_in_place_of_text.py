"""A Parquet file where a text or JSON is expected: what it is, and what to do."""

import json
import shutil
from pathlib import Path

import pytest
from commands import call, expect_error

pytest.importorskip("pyarrow", reason="needs the parquet extra")
import pyarrow
from pyarrow import parquet

import mlx_openelm
from converters.pretraining.documents import Damage, Unit, read_documents
from mlx_openelm.input_files import read_text

DEMO = Path(mlx_openelm.__file__).parent / "demo"
MESSAGE = ["is a Parquet file, not text", "save its rows as JSON lines"]
WRITERS = {  # options of the files that exist: by pandas, the Hub, Spark, DuckDB
    "snappy": {},
    "gzip without dictionaries": {"compression": "gzip", "use_dictionary": False},
    "second version of pages": {"data_page_version": "2.0", "compression": "zstd"},
    "no rows": {},
}


def write(path, options=None, rows=None):
    rows = [{"text": "Once upon a time"}] * 30 if rows is None else rows
    schema = pyarrow.schema([("text", pyarrow.string())])
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    parquet.write_table(table, path, **(options or {}))
    return path


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A file of the name of a text, one of the name of JSON lines, and a model."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.jsonl", "a.yaml", "a.parquet"):
        write(tmp_path / name)
    shutil.copytree(DEMO, tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "--text", "a.parquet"),
        ("evaluate", "--text", "a.txt"),
        ("evaluate", "--tasks", "a.parquet"),
        ("evaluate", "--tasks", "a.jsonl"),
        ("convert", "model", "-q", "--mlx-path", "x", "--calibration", "a.parquet"),
        ("lora", "-c", "a.yaml"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_commands_name_it(work, arguments):
    expect_error(work, *arguments, message=MESSAGE)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_of_prompts(work, name):
    result = call("generate", "--prompts-file", name, "--model", "demo", "--json")
    assert result.exit_code == 1
    problems = [json.loads(line)["error"] for line in result.stdout.splitlines()]
    assert len(problems) == 1
    assert all(part in problems[0] for part in MESSAGE)


def test_a_prompt_on_stdin(work):
    data = (work / "a.parquet").read_bytes()
    expect_error(work, "generate", "-", message=MESSAGE, input=data)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_corpus_with_another_suffix(work, name):
    (damage,) = read_documents(Unit(str(work / name)))
    assert isinstance(damage, Damage)
    assert all(part in damage.describe(name) for part in MESSAGE)


@pytest.mark.parametrize("kind", WRITERS)
def test_every_writer_s_files_are_recognized(tmp_path, kind):
    rows = [] if kind == "no rows" else None
    path = write(tmp_path / "a", WRITERS[kind], rows)
    with pytest.raises(ValueError, match="is a Parquet file"):
        read_text(path)


def test_a_text_that_begins_with_the_magic_is_a_text(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("PAR1", "PAR1: the start", "par1\n", "Par15"):
        path.write_text(text)
        assert read_text(path) == text
        assert list(read_documents(Unit(str(path)))) == [text]
