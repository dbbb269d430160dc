import gzip
import json
import re
import time
from pathlib import Path

import pytest
from trainings import read_data

from mlx_openelm.errors import MAX_LENGTH, OpenELMError
from mlx_openelm.finetuning.records import hold_out
from mlx_openelm.text.templates import Turn

TEXTS = [{"text": f"the {number}th story"} for number in range(40)]
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]
}


def write(path: Path, records: list, newline: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(r) + newline for r in records).encode())
    return path


def refused(path: Path, content: bytes | str | list, **options) -> str:
    """Return the error message for a file with this content."""
    if isinstance(content, list):
        write(path, content)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(OpenELMError) as raised:
        read_data(path, **options)
    message = str(raised.value)
    assert message.endswith(".")
    assert not message.endswith("..")
    assert "\n" not in message
    return message


def turns(path: Path, record: dict, **options) -> tuple[Turn, ...]:
    return read_data(write(path, [record]), **options).train.records[0].turns


@pytest.fixture
def file(tmp_path):
    return tmp_path / "train.jsonl"


# Formats -------------------------------------------------------------------------


def test_the_format_is_detected_from_the_fields(file):
    conversation = (Turn("user", "Hi"), Turn("assistant", "Hello."))
    assert turns(file, {"text": "Once"}) == (Turn("assistant", "Once"),)
    assert turns(file, {"prompt": "Hi", "completion": "Hello."}) == conversation
    assert turns(file, CHAT) == (Turn("system", "Be brief."), *conversation)
    alpaca = {"instruction": "Hi", "input": "", "output": "Hello."}
    assert turns(file, alpaca) == conversation
    assert turns(file, alpaca | {"input": "there"})[0].input == "there"
    assert turns(file, {"instruction": "Hi", "input": None, "output": "Hello."}) == (
        conversation
    )
    keys = {"prompt_key": "question", "completion_key": "answer"}
    assert turns(file, {"question": "Hi", "answer": "Hello."}, **keys) == conversation
    assert read_data(file, **keys).train.fields == ("question", "answer")


def test_further_fields_and_nulls_do_not_hide_the_format(file):
    record = {"text": "all of it", "messages": None, "instruction": "a", "output": "b"}
    assert read_data(write(file, [record])).train.format == "alpaca"
    assert read_data(write(file, [CHAT | {"prompt": "Hi"}])).train.format == "messages"


def test_preferences_are_texts_or_conversations(file):
    plain = {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}
    data = read_data(write(file, [plain]), objective="dpo").train
    assert data.format == "preferences"
    assert data.records[0].turns == (Turn("user", "Hi"), Turn("assistant", "Hello."))
    assert data.records[0].rejected == "No."
    head, answer = CHAT["messages"][:-1], CHAT["messages"][-1]
    lists = {
        "prompt": "Hi",
        "chosen": [*head, answer],
        "rejected": [*head, {"role": "assistant", "content": "No."}],
    }
    data = read_data(write(file, [lists]), objective="dpo").train
    assert data.format == "preferences in messages"
    assert [turn.text for turn in data.records[0].turns] == [
        *("Be brief.", "Hi", "Hello.")
    ]
    assert data.records[0].rejected == "No."
    assert "differ before their last" in refused(
        file, [lists | {"rejected": lists["rejected"][1:]}], objective="dpo"
    )
    assert "the last message of chosen" in refused(
        file,
        [lists | {"chosen": [*CHAT["messages"], head[1]], "rejected": CHAT["messages"]}]
        * 2,
        objective="dpo",
    )
    assert "`objective` dpo" in refused(file, [plain])
    assert "prompt and chosen and rejected" in refused(file, TEXTS, objective="dpo")


def test_a_prompt_apart_precedes_the_messages_of_the_answers(file):
    def turns_of(record):
        return read_data(write(file, [record]), objective="orpo").train.records[0].turns

    *head, answer = CHAT["messages"]
    conversation = tuple(Turn(m["role"], m["content"]) for m in CHAT["messages"])
    answers = {
        "chosen": [answer],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    assert turns_of({"prompt": head} | answers) == conversation
    assert turns_of({"prompt": "Hi"} | answers) == (
        Turn("user", "Hi"),
        conversation[-1],
    )
    repeated = {key: [*head, *value] for key, value in answers.items()}
    assert turns_of({"prompt": head} | repeated) == conversation
    assert turns_of({"prompt": None} | repeated) == conversation
    wrong = refused(file, [{"prompt": [{"role": "x"}]} | answers], objective="orpo")
    assert "prompt[0].role is 'x'" in wrong


# Files ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["lines", "CRLF", "BOM", "blank", "array", "pretty"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_layout_holds_the_same_records(tmp_path, layout, suffix):
    lines = [json.dumps(record) for record in TEXTS]
    lines[0] = '{"text": "the 0th\u2028story"}'  # not a line end in JSON
    text = {
        "lines": "\n".join(lines),
        "CRLF": "\r\n".join(lines) + "\r\n",
        "BOM": "\ufeff" + "\n".join(lines),
        "blank": "\n \n" + "\n\n\t\n".join(lines) + "\n\n",
        "array": f"[{', '.join(lines)}]",
        "pretty": "\ufeff[\n  " + ",\n  ".join(lines) + "\n]\n",
    }[layout]
    name = "train.json" if layout in ("array", "pretty") else "train.jsonl"
    data = gzip.compress(text.encode()) if suffix else text.encode()
    (tmp_path / (name + suffix)).write_bytes(data)
    data = read_data(tmp_path)
    records = sorted([*data.train.records, *data.valid.records], key=str)
    assert len(records) == 40
    assert {record.turns[0].text.split()[-1] for record in records} == {"story"}
    assert len({record.place for record in records}) == 40
    by_text = {record.turns[0].text: record.place for record in records}
    location = {
        "blank": "train.jsonl:15",
        "array": f"train.json:1:{text.index('the 4th') - 9}",
        "pretty": "train.json:6:3",
    }.get(layout, "train.jsonl:5")
    assert by_text["the 4th story"] == location.replace(
        "json:", f"json{suffix}:"
    ).replace("jsonl:", f"jsonl{suffix}:")


def test_a_folder_has_its_own_valid_and_test_files(tmp_path):
    write(tmp_path / "train.jsonl", TEXTS)
    write(tmp_path / "valid.jsonl", TEXTS[:3])
    write(tmp_path / "test.jsonl", [CHAT])
    data = read_data(tmp_path)
    sizes = [len(s.records) for s in (data.train, data.valid, data.test)]
    assert sizes == [40, 3, 1]
    assert data.test.format == "messages"
    assert data.notes == ()


def test_the_digest_is_of_the_bytes_and_of_all_files(tmp_path):
    file = write(tmp_path / "train.jsonl", TEXTS)
    first = read_data(tmp_path)
    assert first.digest == read_data(tmp_path).digest
    file.write_bytes(file.read_bytes() + b"\n")
    changed = read_data(tmp_path)
    assert changed.train.records == first.train.records
    assert changed.digest != first.digest
    write(tmp_path / "test.jsonl", TEXTS[:1])
    assert read_data(tmp_path).digest != changed.digest


def test_a_missing_file_is_reported_with_similar_ones(tmp_path):
    write(tmp_path / "trian.jsonl", TEXTS)
    with pytest.raises(OpenELMError, match=r"no train\.jsonl .*found trian\.jsonl"):
        read_data(tmp_path)
    with pytest.raises(OpenELMError, match=r"Did you mean .*trian\.jsonl"):
        read_data(tmp_path / "train.jsonl")
    with pytest.raises(OpenELMError, match=r"no folder .*none either"):
        read_data(tmp_path / "none" / "train.jsonl")
    write(tmp_path / "train.json", TEXTS)
    write(tmp_path / "train.jsonl", TEXTS)
    with pytest.raises(OpenELMError, match=r"both train\.jsonl and train\.json;"):
        read_data(tmp_path)
    assert "train.parquet" in refused(tmp_path / "train.parquet", b"PAR1")


def test_a_validation_file_of_another_name_is_noted(tmp_path):
    write(tmp_path / "train.jsonl", TEXTS)
    write(tmp_path / "val.jsonl", TEXTS)
    assert any("val.jsonl is ignored" in note for note in read_data(tmp_path).notes)


# Bad input -----------------------------------------------------------------------


def test_a_bad_line_among_thousands_is_reported_with_its_column(file):
    lines = [json.dumps({"text": f"{i}"}) for i in range(5000)]
    lines[3210] = '{"text": "no end'
    message = refused(file, "\n".join(lines))
    assert f"{file}:3211:10 is not JSON" in message
    assert "a problem" in message


def test_all_problems_are_in_one_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # 13 problems with long paths exceed the limit
    file = Path("train.jsonl")
    message = refused(
        file,
        b"\n".join(
            [
                b'{"prompt": "a", "completion": "b"}',
                b'{"prompt": "a" "completion": "b"}',
                b'{"prompt": 5, "completion": ["b"]}',
                b'{"prompt": "a"}',
                b'{"prompt": "a", "completion": " \\n "}',
                b'{"prompt": "\xff", "completion": "b"}',
                b'{"prompt": "a\\u0000", "completion": "\\ud83d b"}',
                b"[1, 2]",
                b'{"text": "all"}',
                b'{"prompt": "a", "completion": ' + b"[" * 100_000,
                b'{"prompt": "a", "completion": null}',
                b'{"prompt": ' + b"1" * 5000 + b', "completion": "b"}',
            ]
        ),
    )
    for problem in (
        ":2:16 is not JSON",
        ":3: prompt is a number, not a string; ",
        ":3: completion is a list, not a string",
        ":4 has no completion",
        ":5: completion is empty",
        ":6:13 is not UTF-8 (the byte 0xff)",
        ":7: prompt contains a NUL",
        r":7: completion contains the unpaired surrogate \ud83d",
        ":8 is a list, not an object",
        ":9 is text while train.jsonl:1 is prompt+completion",
        ":10",
        ":11 has no completion",
        ":12 cannot be read as JSON",
    ):
        assert f"{file}{problem}" in message
    assert "13 problems" in message


def test_a_long_list_of_problems_ends_with_the_number_of_the_rest(file):
    message = refused(file, "nope\n" * 50)
    assert "50 problems" in message
    shown = message.count("is not JSON")
    assert 10 <= shown <= 20
    assert message.endswith(f"; and {50 - shown} more.")
    assert len(message) <= MAX_LENGTH


def test_problems_of_all_files_are_in_one_message(tmp_path):
    write(tmp_path / "valid.jsonl", [{"text": 1}])
    message = refused(tmp_path / "train.jsonl", [{"text": 2}])
    assert "valid" not in message  # only this file is read
    with pytest.raises(OpenELMError, match=r"train\.jsonl:1: .*valid\.jsonl:1: "):
        read_data(tmp_path)


def test_unknown_fields_are_listed_with_the_options_for_them(file):
    message = refused(file, [{"question": "a", "answer": "b"}] * 30)
    assert "has answer, question (as all 30 records), but not messages; or " in message
    assert "`prompt_key`" in message
    assert "a problem" in message


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages is an empty list"),
        ("Hi", "messages is a string, not a list"),
        (["Hi"], "messages[0] is a string, not a message"),
        ([{"role": "tool", "content": "x"}], "messages[0].role is 'tool'"),
        ([{"role": "user", "content": "x"}], "messages has no assistant turn"),
        ([{"role": "user", "content": [{}]}], "messages[0].content is a list"),
        ([{"role": "assistant", "content": ""}], "messages[0].content is empty"),
        ([{"role": "assistant"}], "messages[0] has no content"),
        ([{"role": [], "content": "x"}], "messages[0].role is []"),
    ],
)
def test_problems_of_a_conversation_are_reported(file, messages, problem):
    assert f"{file}:1: {problem}" in refused(file, [{"messages": messages}])


def test_files_that_are_not_json_lines_are_refused(tmp_path):
    for name, content, problem in (
        ("a.jsonl", "", "has no records"),
        ("a.jsonl", "\n \n", "has no records"),
        ("a.json", "[]", "has no records"),
        ("a.json", "[ ]\n", "has no records"),
        ("a.json", '[{"text": "a"},\n  3]', "a.json:2:3 is a number"),
        ("a.json", '[{"text": "a"},\n {"text" 3}]', "a.json:2:10 is not JSON"),
        ("a.json", b'[{"text": "a"},\n {"text": "\xe9"}]', "a.json:2:12 is not UTF-8"),
        ("a.jsonl", "Once upon a time", "a.jsonl:1:1 is not JSON"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl:1:1 is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "truncated"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00" + b"\xff" * 40, "a.jsonl.gz is damaged"),
    ):
        assert problem in refused(tmp_path / name, content), name


# Held-out records ----------------------------------------------------------------


def texts_of(records) -> set[str]:
    return {record.turns[0].text for record in records}


def test_a_tenth_is_held_out_by_content_alone(tmp_path):
    data = read_data(write(tmp_path / "train.jsonl", TEXTS))
    assert (len(data.train.records), len(data.valid.records)) == (36, 4)
    assert "4 of the 40 records" in data.notes[0]
    (tmp_path / "other").mkdir()
    other = read_data(write(tmp_path / "other" / "b.jsonl", TEXTS[::-1], "\r\n\n"))
    assert texts_of(other.valid.records) == texts_of(data.valid.records)


def test_equal_records_are_in_the_same_split(tmp_path):
    spaced = [{"text": record["text"].replace(" ", " \n")} for record in TEXTS]
    data = read_data(write(tmp_path / "a.jsonl", [*TEXTS, *spaced, *TEXTS[:30]]))
    trained = {record.key for record in data.train.records}
    held_out = {record.key for record in data.valid.records}
    assert not trained & held_out
    assert len(trained | held_out) == 40
    assert 1 <= len(data.valid.records) <= 11


def test_small_files_are_split(tmp_path):
    one = read_data(write(tmp_path / "a.jsonl", TEXTS[:1]))
    assert (len(one.train.records), one.valid) == (1, None)
    assert "without validation" in one.notes[0]
    two = read_data(write(tmp_path / "a.jsonl", TEXTS[:2]))
    assert (len(two.train.records), len(two.valid.records)) == (1, 1)
    same = read_data(write(tmp_path / "a.jsonl", TEXTS[:1] * 5))
    assert (len(same.train.records), same.valid) == (5, None)
    lopsided = read_data(write(tmp_path / "a.jsonl", TEXTS[:1] * 5 + TEXTS[1:2] * 9))
    assert (len(lopsided.train.records), len(lopsided.valid.records)) == (9, 5)


def test_at_most_256_records_are_held_out(tmp_path):
    many = [{"text": f"{i}"} for i in range(5000)]
    records = read_data(write(tmp_path / "a.jsonl", many))
    assert len(records.valid.records) == 256
    kept, held_out = hold_out((*records.train.records, *records.valid.records))
    assert {r.key for r in held_out} == {r.key for r in records.valid.records}
    assert len(kept) == 5000 - 256


# Real data -----------------------------------------------------------------------


def test_gsm8k_and_commonsense_are_read_whole(shared):
    data = read_data(
        shared / "data" / "gsm8k", prompt_key="question", completion_key="answer"
    )
    sizes = [len(s.records) for s in (data.train, data.valid, data.test)]
    assert sizes == [7473 - 256, 256, 1319]
    for file in (shared / "data" / "commonsense").glob("*.json"):
        data = read_data(file)
        count = len(json.loads(file.read_bytes()))
        assert len(data.train.records) + len(data.valid.records) == count
        lines = file.read_text().split("\n")
        for record in data.train.records[::100]:
            line, column = re.findall(r"\d+", record.place.split(".json")[1])
            assert lines[int(line) - 1][int(column) - 1] == "{"


def test_many_records_are_read_in_seconds(tmp_path):
    record = {"instruction": "Choose. " * 60, "input": "", "output": "the 1st"}
    write(tmp_path / "a.jsonl", [record | {"output": f"{i}"} for i in range(20_000)])
    start = time.process_time()
    read_data(tmp_path / "a.jsonl")
    assert time.process_time() - start < 10  # 170,000: a few seconds, where it is idle
