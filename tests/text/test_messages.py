"""Messages with content parts and other names of roles, as OpenAI's clients write."""

import json

import pytest

from mlx_openelm.finetuning.record_formats import (
    preference_formats,
    supervised_formats,
)
from mlx_openelm.finetuning.records import read_data
from mlx_openelm.text.messages import check_messages
from mlx_openelm.text.templates import Turn


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def test_text_parts_are_joined_and_developer_is_the_system():
    messages = [
        {"role": "developer", "content": parts("Be ", "kind.")},
        {"role": "user", "content": parts("Hi")},
        {"role": "assistant", "content": "Hello"},
    ]
    turns, problems = check_messages(messages)
    assert problems == []
    assert turns == (
        Turn("system", "Be kind."),
        Turn("user", "Hi"),
        Turn("assistant", "Hello"),
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([{"type": "image_url", "image_url": {}}], "is a list with parts that are not"),
        ([*parts("a"), "b"], "is a list with parts that are not text"),
        ([{"type": "text", "text": 1}], "is a list with parts that are not text"),
        (parts(), "is empty"),
        (parts(" "), "is empty"),
        (parts("\ud800"), "contains the unpaired surrogate"),
    ],
)
def test_other_parts_are_named(content, problem):
    messages = [{"role": "user", "content": content}]
    _, problems = check_messages(messages, not_empty="user")
    assert len(problems) == 1
    assert problems[0].startswith(f"messages[0].content {problem}")


def test_records_are_read_with_parts(tmp_path):
    path = tmp_path / "d.jsonl"
    user = {"role": "user", "content": parts("a")}
    answers = [{"role": "assistant", "content": parts(text)} for text in "bc"]
    path.write_text(json.dumps({"messages": [user, answers[0]]}))
    (record,) = read_data(path, supervised_formats()).train.records
    assert record.turns == (Turn("user", "a"), Turn("assistant", "b"))
    both = {"chosen": [user, answers[0]], "rejected": [user, answers[1]]}
    path.write_text(json.dumps({"prompt": "a", **both}))
    (record,) = read_data(path, preference_formats("dpo", None)).train.records
    assert (record.turns[-1].text, record.rejected) == ("b", "c")
