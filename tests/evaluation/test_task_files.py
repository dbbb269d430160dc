"""Local task files."""

import gzip
import json
import random
from pathlib import Path

import pytest

from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.task_files import read_task, read_tasks

INSTRUCTION = (
    "Please answer the following question with true or false, question: is it so?"
    "\n\nAnswer format: true/false"
)
PEFT = {"instruction": INSTRUCTION, "input": "", "output": "", "answer": "false"}
PLAIN = {"context": "The sky is", "choices": ["red", "blue"], "answer": 1}


def write(folder, records, name="task.json"):
    path = folder / name
    lines = [json.dumps(record) for record in records]
    text = "\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]"
    path.write_text(text)
    return path


def read_one(folder, record):
    (question,) = read_task(write(folder, [record])).questions
    return question


def test_a_commonsense_question_is_rendered_with_apple_s_template(tmp_path):
    question = read_one(tmp_path, PEFT)
    indent = " " * 16
    assert question.context == (
        "Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.  \n"
        f"\n{indent}### Instruction:"
        f"\n{indent}{INSTRUCTION}"
        f"\n{indent}"
        f"\n{indent}### Response:"
        f"\n{indent}"
    )
    assert question.pairs == [
        (question.context, "the correct answer is true"),
        (question.context, "the correct answer is false"),
    ]
    assert question.answer == 1


def test_an_input_is_rendered_in_the_template(tmp_path):
    context = read_one(tmp_path, PEFT | {"input": "Given this."}).context
    indent = " " * 16
    assert "provides further context." in context
    assert f"\n{indent}\n{indent}### Input:\n{indent}Given this.\n" in context


def test_choices_are_those_of_the_last_answer_format(tmp_path):
    text = "Answer format: x/y says a man.\n\nOption1: a Option2: b Answer format: {}"
    record = {"instruction": text.format("option1/ option2\n"), "answer": "option2"}
    question = read_one(tmp_path, record)
    assert question.choices == tuple(f"the correct answer is option{n}" for n in (1, 2))
    assert question.answer == 1


def test_a_space_separates_context_and_choice(tmp_path):
    assert read_one(tmp_path, PLAIN).pairs == [
        ("The sky is", " red"),
        ("The sky is", " blue"),
    ]
    record = {"question": "How?", "choices": ["so", "not"], "answer": "so"}
    assert read_one(tmp_path, record).context == "Question: How?\nAnswer:"


@pytest.mark.parametrize(
    ("answer", "choices", "meant"),
    [
        (0, ["x", "y"], 0),
        ("y", ["x", "y"], 1),
        ("B", ["x", "y"], 1),
        ("b", ["x", "y"], 1),
        ("A", ["B", "A"], 1),  # a text takes precedence over a letter
        (1, ["1", "2"], 1),  # a number is an index
        ("1", ["1", "2"], 0),  # a text is a text
    ],
)
def test_an_answer_is_an_index_a_text_or_a_letter(tmp_path, answer, choices, meant):
    record = {"context": "Q", "choices": choices, "answer": answer}
    assert read_one(tmp_path, record).answer == meant


def test_arrays_and_json_lines_give_the_same_task(tmp_path):
    records = [PEFT, PLAIN, PLAIN | {"answer": 0}]
    array, lines = (
        read_task(write(tmp_path, records, name)) for name in ("a.json", "a.jsonl")
    )
    assert array == lines
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert read_task(packed) == array
    assert array.name == "a"
    assert array.digest == lines.digest
    assert array.digest != read_task(write(tmp_path, records[:2])).digest


def test_a_limit_keeps_the_first_questions_after_shuffling(tmp_path):
    path = write(tmp_path, [PLAIN | {"context": f"Q{n}"} for n in range(50)])
    order = list(range(1, 51))
    random.Random(83652).shuffle(order)
    assert [q.line for q in read_task(path).questions] == order
    assert [q.line for q in read_task(path, limit=7).questions] == order[:7]
    assert read_task(path, limit=99) == read_task(path)
    with pytest.raises(OpenELMError, match="`limit` is 0"):
        read_task(path, limit=0)


def without(record, key):
    return {k: v for k, v in record.items() if k != key}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (without(PEFT, "answer"), "has no answer"),
        (PEFT | {"answer": "maybe"}, "'maybe', which is not one of its choices: 'tru"),
        (PEFT | {"answer": 1}, "has a number as answer, not a string"),
        (PEFT | {"instruction": "Is it?"}, 'no "Answer format:" in its instruction'),
        (PEFT | {"instruction": "Answer format: a"}, "one choice"),
        (PEFT | {"instruction": "Answer format: a/b\n\nThe end"}, "has lines after"),
        (PEFT | {"instruction": "Answer format: a/"}, "an empty choice"),
        (PEFT | {"instruction": "Answer format: a/b/a"}, "the choice 'a' twice"),
        (PEFT | {"instruction": None}, "has no instruction"),
        (PEFT | {"input": 3}, "has a number as input"),
        (without(PLAIN, "answer"), "has no answer"),
        (PLAIN | {"answer": 2}, "has the answer 2; its choices are 0 to 1"),
        (PLAIN | {"answer": -1}, "has the answer -1"),
        (PLAIN | {"answer": 10**400}, "has the answer 1000"),
        (PLAIN | {"answer": True}, "an answer that is true or false"),
        (PLAIN | {"answer": 1.0}, "an answer that is a number"),
        (
            PLAIN | {"answer": "C"},
            "'C', which is not one of its choices: 'red', 'blue'",
        ),
        (PLAIN | {"choices": ["one"]}, "has one choice in its choices"),
        (PLAIN | {"choices": []}, "has no choices in its choices"),
        (PLAIN | {"choices": ["a", " "]}, r"an empty choices\[1\]"),
        (PLAIN | {"choices": ["a", 3]}, r"has a number as choices\[1\], not a string"),
        (PLAIN | {"choices": ["a", "a"]}, "the choice 'a' twice"),
        (PLAIN | {"choices": "ab"}, "choices that are a string, not a list"),
        (PLAIN | {"context": ""}, "an empty context"),
        (PLAIN | {"context": "half \ud800"}, r"unpaired surrogate \\ud800"),
        (PLAIN | {"question": "Both?"}, "both a context and a question"),
        (without(PLAIN, "context"), r"no context \(or question\)"),
        ({"prompt": "Hi"}, "has 'prompt'; it needs instruction and answer, or"),
        (["a"], "is a list, not an object"),
        (None, "is null, not an object"),
    ],
)
def test_a_problem_is_reported_with_the_number_of_its_record(tmp_path, record, problem):
    path = write(tmp_path, [PLAIN, record, PLAIN])
    with pytest.raises(OpenELMError, match=rf"task\.json: record 2 .*{problem}") as e:
        read_task(path)
    assert len(str(e.value)) < 500
    assert str(e.value).endswith(".")


def test_many_problems_are_not_all_listed(tmp_path):
    path = write(tmp_path, [PLAIN | {"answer": 9}] * 40)
    with pytest.raises(OpenELMError, match=r"record 5 .*; and 35 more\.$"):
        read_task(path)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "holds no questions; it is empty"),
        (b"[]", "holds no questions"),
        (b"\xef\xbb\xbf \n\n", "holds no questions"),
        (b"hello", r"task:1:1 is not JSON"),
        (b'[{"a": 1}\n,\n', r"task:\d:\d is not JSON"),
        (b'{"a": 1}\n\n{"a": ', r"task:3:6 is not JSON"),
        (b"\n\xff", r"task:2:1 is not UTF-8 \(the byte 0xff\)"),
        (b'[{"answer": ' + b"9" * 5000 + b"}]", "cannot be read as JSON"),
        (b"[" * 100000, "cannot be read as JSON"),
    ],
)
def test_an_invalid_task_file_is_refused(tmp_path, data, problem):
    path = tmp_path / "task"
    path.write_bytes(data)
    with pytest.raises(OpenELMError, match=problem):
        read_task(path)


def test_a_missing_file_is_reported(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path, Path("nul\0.json")):
        with pytest.raises(OpenELMError, match="Cannot read the task"):
            read_task(path)


def test_two_tasks_of_the_same_name_are_refused(tmp_path):
    paths = [write(tmp_path, [PLAIN], name) for name in ("a.json", "a.jsonl")]
    with pytest.raises(OpenELMError, match="same task name a"):
        read_tasks(paths)
    assert [task.name for task in read_tasks(paths[:1])] == ["a"]


def test_the_published_test_files_are_read_completely(shared):
    sizes = {"ARC-Easy": 2376, "openbookqa": 500, "piqa": 1838, "winogrande": 1267}
    for name, size in sizes.items():
        path = shared / "data/commonsense" / f"{name}.json"
        task = read_task(path)
        assert len(task.questions) == size
        records = json.loads(path.read_text())
        for question in task.questions:
            right = question.choices[question.answer]
            assert right == records[question.line - 1]["output"]
