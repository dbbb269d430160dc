"""The published recipes with a small model and a few records."""

import json

import pytest
from commands import call, expect_error

RECORD = {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(RECORD) + "\n" for _ in range(12)))
    return file


def dry_run(data, *options):
    arguments = ("-c", "lora/instruct-270m", "--model", "demo", "--data", data)
    return ("lora", *arguments, "--dry-run", *options)


def test_a_context_that_is_too_short_has_the_length_to_set(data):
    expect_error(
        *(data.parent, *dry_run(data)),
        message="--max-seq-length is 1024, more than the model's context of 512 tokens"
        "; set it to 512 or less.",
    )


@pytest.mark.parametrize(("warmup", "is_noted"), [(None, True), (5, True), (4, False)])
def test_a_run_within_its_warm_up_has_a_note(data, warmup, is_noted):
    options = ("--max-seq-length", "64", "--max-prompt-length", "32")
    if warmup is not None:
        options += ("--warmup-steps", warmup)
    result = call(*dry_run(data, *options))
    assert result.exit_code == 0, result.stderr
    share = 5 / ((warmup or 230) + 1)  # the rate of the last of 5 steps
    note = (
        f"note: --warmup-steps is {warmup or 230}, but the run has 5 steps: its "
        f"learning rate reaches {share:.1%} of 2e-05; "
    )
    assert (note in result.stderr) == is_noted, result.stderr


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": None}, "has messages (null), but not messages"),
        ({"text": None, "id": 3}, "has id, text (null), but not messages"),
    ],
)
def test_fields_that_are_null_are_marked(data, record, message):
    data.write_text(json.dumps(record) + "\n")
    expect_error(data.parent, "lora", "--data", data, message=message)


def test_the_name_without_a_size_proposes_all_sizes(data):
    names = [f"lora/instruct-{size}" for size in ("1_1b", "270m", "3b", "450m")]
    message = f"(did you mean {', '.join(names)}?)"
    expect_error(data.parent, "lora", "-c", "lora/instruct", message=message)
