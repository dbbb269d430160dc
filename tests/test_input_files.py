"""Limits of JSON and text that is read, and of the texts of errors."""

import json
import re
from pathlib import Path

import pytest

import mlx_openelm
from mlx_openelm import input_files
from mlx_openelm.errors import MAX_LENGTH, OpenELMError
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.input_files import MAX_DEPTH, parse_json, read_json, read_text
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.recipe_loader import make_recipe
from mlx_openelm.storage.appended_jsonl import parse_line
from mlx_openelm.training.events import METRICS, read_events

DEEP = "[" * 100_000 + "]" * 100_000
PACKAGES = [
    *Path(mlx_openelm.__file__).parent.rglob("*.py"),
    *Path(mlx_openelm.__file__).parents[1].joinpath("converters").rglob("*.py"),
]


def nested(depth):
    return '{"a": ' * (depth - 1) + "[]" + "}" * (depth - 1)


def test_json_is_parsed_as_by_json_loads():
    for text in ("{}", " [1, {}]\n", '"a"', "null", "1e5", '{"a": [[]], "b": "[[["}'):
        assert parse_json(text) == parse_json(text.encode()) == json.loads(text)
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]
    many = "[" + ",".join(["[]"] * 500) + "]"  # many brackets, two levels
    assert parse_json(many) == json.loads(many)
    for text in ("", "[1", "[1] 2", '{"a" 1}', "\ufeff1"):
        with pytest.raises(json.JSONDecodeError):
            parse_json(text)


@pytest.mark.parametrize(
    "text",
    [DEEP, DEEP[:99_999], nested(MAX_DEPTH + 1), f'{{"a": {DEEP}}}', "9" * 5000],
)
def test_json_that_no_reader_can_use_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"nested|digits"):
        parse_json(text)
    assert parse_json(nested(MAX_DEPTH))


def test_files_of_json_and_yaml_have_limits(tmp_path, monkeypatch):
    cycle = "a: &a [*a]"
    for name, text in (("c.json", DEEP), ("c.yaml", DEEP), ("d.yaml", cycle)):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(OpenELMError, match="nested"):
            read_mapping(path)
    path.write_text("a: 1\nb: 2\n")
    assert read_mapping(path) == {"a": 1, "b": 2}
    monkeypatch.setattr(input_files, "MAX_BYTES", 8)
    with pytest.raises(OpenELMError, match="larger than"):
        read_mapping(path)
    for read in (read_text, read_json):
        with pytest.raises(ValueError, match="larger than"):
            read(path)


def test_damaged_lines_of_logs_are_ignored(tmp_path):
    assert parse_line(DEEP.encode() + b"\n") is None
    event = {"event": "note", "step": 1}
    lines = [json.dumps(event), DEEP, f'{{"event": "note", "step": 1, "a": {DEEP}}}']
    (tmp_path / METRICS).write_text("\n".join(lines))
    assert read_events(tmp_path) == [event]


def test_one_parser_reads_all_json():
    """`json.loads` has no limit.

    Requests of the server have their own; safetensors checks the headers of weights.
    """
    allowed = {"input_files.py", "weight_reader.py"}
    copies = re.compile(r"json\.loads\((json\.dumps\(|progress\))")
    for path in PACKAGES:
        text = copies.sub("", path.read_text())
        assert path.name in allowed or "json.load" not in text, path


def test_errors_are_short_enough_to_read():
    long = "The file " + "x" * 100_000 + " is wrong; correct it."
    message = str(OpenELMError(long))
    assert len(message) <= MAX_LENGTH
    assert message.startswith("The file x")
    assert message.endswith("is wrong; correct it.")
    assert str(OpenELMError("Short.")) == "Short."


def test_a_recipe_that_repeats_a_list_many_times_is_one_short_error():
    value = ["x"] * 10
    for _ in range(9):
        value = [value] * 10  # a billion of "x", as aliases of YAML make them
    with pytest.raises(OpenELMError, match=r"data is .*expected str"):
        make_recipe(FinetuneRecipe, {"data": value}, "r.yaml")
