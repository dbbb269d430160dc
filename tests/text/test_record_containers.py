"""Containers of records: all readers take the same ones, with limits."""

import gzip
import io
import json

import pytest

from converters.pretraining.packing import read_corpus
from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.task_files import read_task
from mlx_openelm.finetuning.record_formats import (
    preference_formats,
    supervised_formats,
)
from mlx_openelm.finetuning.records import read_data
from mlx_openelm.generation.prompt_file import read_prompts
from mlx_openelm.text import record_files
from mlx_openelm.text.record_files import read_values

BOM = b"\xef\xbb\xbf"
KEYS = {
    "lora": lambda text: {"text": text},
    "dpo": lambda text: {"prompt": text, "chosen": "a", "rejected": "b"},
    "evaluate": lambda t: {"question": t, "choices": ["a", "b"], "answer": 0},
    "prompts": lambda text: {"prompt": text},
    "pretrain": lambda text: {"text": text},
}


def texts_in(reader, path):
    match reader:
        case "lora":
            data = read_data(path, supervised_formats())
        case "dpo":
            data = read_data(path, preference_formats("dpo", None))
        case "evaluate":
            questions = sorted(read_task(path).questions, key=lambda q: q.line)
            return [q.context.split()[1] for q in questions]
        case "prompts":
            prompts = read_prompts(path).prompts
            if prompts[-1].problem:
                raise OpenELMError("; ".join(p.problem for p in prompts))
            return [prompt.content for prompt in prompts]
        case "pretrain":
            return list(read_corpus([str(path)]).documents)
    held_out = data.valid.records if data.valid else ()
    records = sorted((*data.train.records, *held_out), key=lambda r: r.place)
    return [record.turns[0].text for record in records]


def lines(values):
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def indented(values):
    return b"\n".join(json.dumps(value, indent=2).encode() for value in values)


CONTAINERS = {
    "lines.jsonl": lines,
    "lines.NDJSON": lines,
    "array.json": lambda values: json.dumps(values).encode(),
    "indented_array.json": lambda values: json.dumps(values, indent=1).encode(),
    "indented.jsonl": indented,
    "marked.jsonl": lambda values: BOM + BOM.join(lines([v]) for v in values),
    "marked.json": lambda values: BOM + json.dumps(values, indent=1).encode(),
    "marked_objects.json": lambda values: BOM + indented(values),
    "packed.jsonl.gz": lambda values: gzip.compress(lines(values)),
    "packed.json.gz": lambda values: gzip.compress(indented(values)),
    "packed_without_the_suffix.jsonl": lambda values: gzip.compress(lines(values)),
    "not_packed.jsonl.gz": lines,
}


@pytest.mark.parametrize("reader", KEYS)
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_reader_takes_every_container(tmp_path, reader, name):
    texts = ["one", "two", "three"]
    path = tmp_path / name
    path.write_bytes(CONTAINERS[name]([KEYS[reader](text) for text in texts]))
    assert sorted(texts_in(reader, path)) == sorted(texts)


UNREADABLE = {
    "utf16.jsonl": lambda values: lines(values).decode().encode("utf-16"),
    "utf16.json": lambda values: json.dumps(values, indent=1).encode("utf-16-le"),
    "large.jsonl": lambda values: lines([values[0], *values]).replace(
        b"1", b"1" * 4000
    ),
    "large.json": lambda values: json.dumps(values).encode().replace(b"1", b"1" * 4000),
    "large.jsonl.gz": lambda values: gzip.compress(
        indented(values).replace(b"1", b"1" * 4000)
    ),
    "deep.jsonl": lambda values: b"[" * 900 + b"]" * 900 + b"\n",
}


@pytest.mark.parametrize("reader", KEYS)
@pytest.mark.parametrize("name", UNREADABLE)
def test_every_reader_reports_what_it_cannot_read_once(
    tmp_path, monkeypatch, reader, name
):
    monkeypatch.setattr(record_files, "MAX_RECORD_BYTES", 2000)
    monkeypatch.setattr(record_files, "_CHUNK", 64)
    path = tmp_path / name
    path.write_bytes(UNREADABLE[name]([KEYS[reader](f"{i}") for i in range(1, 4)]))
    with pytest.raises(OpenELMError) as error:
        texts_in(reader, path)
    words = {"utf": "UTF-16", "lar": "is larger than", "dee": "nested"}[name[:3]]
    assert str(error.value).count(words) == 1


class Endless(io.RawIOBase):
    """A file that would not fit into any memory; counts what is read of it."""

    def __init__(self, start):
        self.start, self.bytes = start, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        part = (self.start or b"a" * len(buffer))[: len(buffer)]
        self.start = b""
        buffer[: len(part)] = part
        self.bytes += len(part)
        return len(part)


@pytest.mark.parametrize("start", [b'{"text": "', b'[{"text": "', b'{\n"text": "'])
def test_a_record_without_end_is_not_read_into_memory(monkeypatch, start):
    monkeypatch.setattr(record_files, "MAX_RECORD_BYTES", 1 << 18)
    endless = Endless(start)
    (value,) = read_values(io.BufferedReader(endless))
    assert "is larger than" in value.problem
    assert endless.bytes < 1 << 20


def test_values_with_line_breaks_have_a_place():
    data = b'\n{\n "a": 1}\n\n  {"b": [\n2]}{"c" 1}\n'
    first, second, problem = read_values(io.BytesIO(data))
    assert (first.value, first.place) == ({"a": 1}, "2:1")
    assert (second.value, second.place) == ({"b": [2]}, "5:3")
    assert problem.place == "6:9"
    assert "Expecting ':'" in problem.problem
    truncated = list(read_values(io.BytesIO(b'{"a": 1,\n"b": 2}\n{\n"c": ')))
    assert [value.value for value in truncated] == [{"a": 1, "b": 2}, None]


def test_one_damaged_line_does_not_hide_the_others():
    data = b'{"a": "x\n{"a": 1}\n{"a": 2\n'
    first, second, third = read_values(io.BytesIO(data))
    assert (first.place, second.value) == ("1:7", {"a": 1})
    assert third.place == "3:8"
