"""Training data in Parquet files, as the data sets of the Hub are stored."""

import json
import sys

import pytest
from commands import call, expect_error
from models import small_tokenizer
from trainings import read_data

pytest.importorskip("pyarrow", reason="needs the parquet extra")
import pyarrow
from pyarrow import parquet

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.further_objectives.choice import make_objective
from mlx_openelm.finetuning.recipe import FinetuneRecipe


def preference(number):
    """A row of argilla-ultrafeedback-binarized-preferences-cleaned."""
    question = {"content": f"What is {number} + 1?", "role": "user"}
    return {
        "source": "made",
        "prompt": question["content"],
        "chosen": [question, {"content": f"It is {number + 1}.", "role": "assistant"}],
        "chosen-rating": 5.0,
        "rejected": [question, {"content": "I do not know.", "role": "assistant"}],
        "rejected-rating": float("nan"),
    }


ROWS = [preference(number) for number in range(600)]  # more than one batch


def write(path, rows, **options):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def read_samples(path, **options):
    recipe = FinetuneRecipe(
        data=str(path), max_seq_length=64, max_prompt_length=32, **options
    )
    objective = make_objective(recipe)
    data = read_data(path, recipe.objective)
    samples, _ = objective.make_samples(data.train, small_tokenizer(), "instruct")
    return data, [
        (pair.chosen.tokens.tolist(), pair.rejected.tokens.tolist()) for pair in samples
    ]


def test_message_lists_of_preferences_are_those_of_json(tmp_path):
    """The same samples as the JSON lines of the same records, in the same order."""
    file = write(tmp_path / "train.parquet", ROWS, row_group_size=100)
    data, samples = read_samples(file, objective="dpo")
    lines = tmp_path / "train.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    from_json, expected = read_samples(lines, objective="dpo")
    assert samples == expected
    assert len(samples) + len(data.valid.records) == 600
    assert data.train.format == from_json.train.format == "preferences in messages"
    place = {record.place for record in data.train.records}
    assert place <= {f"train.parquet:{number}" for number in range(1, 601)}


def test_the_prompt_column_is_not_needed(tmp_path):
    rows = [{k: r[k] for k in ("chosen", "rejected")} for r in ROWS[:20]]
    assert read_data(write(tmp_path / "a.parquet", rows), "dpo").train.records


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Once upon a time."},
        {"prompt": "Hi", "completion": "Hello."},
        {"messages": ROWS[0]["chosen"]},
    ],
    ids=lambda row: next(iter(row)),
)
def test_other_formats_are_read_too(tmp_path, row):
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        write(tmp_path / "data" / f"{split}.parquet", [row] * 3)
    data = read_data(tmp_path / "data")
    assert len(data.train.records) == len(data.valid.records) == 3


@pytest.mark.parametrize("row_group_size", [2, 100])
def test_message_lists_of_other_types_are_read(tmp_path, row_group_size):
    """Long strings, and maps instead of structures."""
    text = pyarrow.large_string()
    structure = pyarrow.struct([("role", text), ("content", text)])
    messages = [row["chosen"] for row in ROWS[:5]]
    expected = read_data(write(tmp_path / "a.parquet", [{"messages": messages[0]}] * 5))
    for kind, values in (
        (pyarrow.large_list(structure), messages),
        (
            pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string())),
            [[list(message.items()) for message in row] for row in messages],
        ),
    ):
        table = pyarrow.table({"messages": pyarrow.array(values, kind)})
        parquet.write_table(
            table, tmp_path / "b.parquet", row_group_size=row_group_size
        )
        data = read_data(tmp_path / "b.parquet")
        records = [*data.train.records, *data.valid.records]
        assert len(records) == 5
        assert expected.train.records[0].turns in [record.turns for record in records]


def test_problems_have_the_number_of_their_row(tmp_path):
    rows = [*ROWS[:3], preference(3) | {"rejected": None}]
    with pytest.raises(OpenELMError, match=r"a\.parquet:4 has no rejected"):
        read_data(write(tmp_path / "a.parquet", rows), "dpo")


def test_a_damaged_file_is_an_error(tmp_path):
    file = write(tmp_path / "train.parquet", ROWS)
    content = file.read_bytes()
    for kept in (content[: len(content) // 2], content[:200] + content[300:]):
        file.write_bytes(kept)
        message = ["train.parquet:1 cannot be read as Parquet"]
        expect_error(tmp_path, "lora", "--data", file, message=message)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    file = write(tmp_path / "train.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = "pip install 'mlx-openelm[parquet]'"
    expect_error(tmp_path, "lora", "--data", file, message=message)


def test_lora_trains_on_it(tmp_path):
    file = write(tmp_path / "train.parquet", ROWS[:40])
    result = call(
        *("lora", "-c", "lora/instruct-450m", "--model", "demo", "--data", file),
        *("--adapter-path", tmp_path / "out", "--fine-tune-type", "lora"),
        *("--iters", "2", "--batch-size", "2", "--grad-accumulation-steps", "1"),
        *("--val-batches", "1", "--max-seq-length", "128", "--max-prompt-length", "64"),
    )
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "adapters.safetensors").is_file()


def test_dates_without_a_python_value_are_left_out_or_reported(tmp_path):
    """Dates in other columns are no problem; in a message they are reported."""
    far = pyarrow.array([10**7] * 4, pyarrow.date32())  # the year 29349
    texts = pyarrow.array(["a", "b", "c", "d"])
    zone = pyarrow.array([0] * 4, pyarrow.timestamp("us", tz="Nowhere/City"))
    file = tmp_path / "train.parquet"
    table = {"prompt": texts, "completion": texts, "day": far, "time": zone}
    parquet.write_table(pyarrow.table(table), file)
    data = read_data(file, "sft")
    assert sum(len(split.records) for split in data.splits.values()) == 4
    inner = pyarrow.StructArray.from_arrays([texts, far], names=["content", "day"])
    parquet.write_table(pyarrow.table({"prompt": inner, "completion": texts}), file)
    with pytest.raises(OpenELMError, match=r"parquet:1 cannot be read as Parquet \("):
        read_data(file, "sft")


def test_bytes_are_not_called_a_number(tmp_path):
    rows = [{"prompt": b"Who?", "completion": "A king."}] * 2
    file = write(tmp_path / "train.parquet", rows)
    with pytest.raises(OpenELMError, match="prompt is of type bytes, not a string"):
        read_data(file, "sft")
