"""The reader of JSON values, compared with json.loads of the whole file."""

import gzip
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_openelm.text import record_files
from mlx_openelm.text.record_files import JsonValue, open_records, read_values

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner),
    max_leaves=6,
)
objects = st.dictionaries(texts, values, max_size=3)
gaps = st.sampled_from(["", " ", "\n", "\r\n  ", "\t\n\n"])
chunks = st.sampled_from([1, 2, 3, 7, 64, 1 << 16])


@pytest.fixture(scope="module")
def chunk():
    """Change the size of the chunks that are read."""
    size = record_files._CHUNK

    def change(size):
        record_files._CHUNK = size

    yield change
    record_files._CHUNK = size


def read(data, **options):
    return list(read_values(io.BytesIO(data), **options))


@settings(max_examples=300)
@given(objects, st.lists(values, max_size=5), gaps, st.booleans(), chunks)
def test_an_array_is_read_as_json_reads_it(chunk, first, rest, gap, ascii, size):
    chunk(max(size, 8))  # the first chunk must contain the start of the array
    parts = [json.dumps(v, ensure_ascii=ascii) for v in (first, *rest)]
    text = f"[{gap}" + f"{gap},{gap}".join(parts) + f"{gap}]{gap}"
    result = read(text.encode())
    assert [v.value for v in result] == json.loads(text)
    lines, position = text.split("\n"), 0
    for value, part in zip(result, parts, strict=True):
        assert value.problem == ""
        position = text.index(part, position)
        before = text[:position]
        assert value.line == before.count("\n") + 1
        assert value.column == len(before.rpartition("\n")[2]) + 1
        assert lines[value.line - 1][value.column - 1] == part[0]
        position += len(part)


@settings(max_examples=200)
@given(st.lists(objects | texts, max_size=6), st.sampled_from(["\n", "\r\n", "\n \n"]))
def test_lines_are_read_as_json_reads_them(objects, end):
    data = end.join(json.dumps(value, ensure_ascii=False) for value in objects).encode()
    step = end.count("\n")
    expected = [JsonValue(i * step + 1, value=v) for i, v in enumerate(objects)]
    assert read(data) == expected
    assert read(b"\xef\xbb\xbf" + data + b"\n") == expected
    assert read(data, skip=2) == expected[2:]


@settings(max_examples=300)
@given(objects, st.lists(objects, max_size=3), st.data(), chunks)
def test_a_damaged_array_is_read_up_to_the_damage(chunk, first, rest, data, size):
    chunk(max(size, 8))
    whole = [first, *rest]
    text = json.dumps(whole)
    at = data.draw(st.integers(2, len(text) - 1))
    damaged = text[:at] + data.draw(st.sampled_from(["", "]", ",", "\x01", "}", "1"]))
    damaged += text[at + 1 :]
    try:
        expected = json.loads(damaged)
    except json.JSONDecodeError:
        *valid, last = read(damaged.encode())
        assert last.problem
        assert not any(v.problem for v in valid)
        before = sum(len(json.dumps(whole[: n + 1])) <= at for n in range(len(whole)))
        assert [v.value for v in valid][:before] == whole[:before]
    else:
        if isinstance(expected, list):
            assert [v.value for v in read(damaged.encode())] == expected


@pytest.mark.parametrize(
    ("data", "places"),
    [
        (b'{"a": 1}\n{"a" 1}\n{}', ["1", "2:6 is not JSON (Expecting ':'", "3"]),
        (b'{"a": "\xff"}\n{}', ["1:8 is not UTF-8 (the byte 0xff)", "2"]),
        (b'"\xc3\xa4\xe4"\n', ["1:3 is not UTF-8 (the byte 0xe4)"]),
        (b'[{},\n"\xe4",\n{}]', ["1:2", "2:2 is not UTF-8 (the byte 0xe4)", "3:1"]),
        (b"[{},\n\xe4{}]", ["1:2", "2:1 is not UTF-8 (the byte 0xe4)"]),
        (b"[{},\n{}", ["1:2", "2:1", "2:3 is not JSON (Expecting ',' delimiter)"]),
        (b'[{},\n{"\xc3', ["1:2", "2:3 is not UTF-8 (the byte 0xc3)"]),
        (b"[{} {}]", ["1:2", "1:5 is not JSON (Expecting ',' delimiter)"]),
        (b"[{},]", ["1:2", "1:5 is not JSON (Expecting value)"]),
        (b"[\n]\n\n x", ["4:2 is after the end of the array"]),
        (b'[["a"], 2]', ["1:2", "1:9"]),
        (b"[null,\n{}]\n\n", ["1:2", "2:1"]),
        (b"[1]\n\n[2]\n", ["1", "3"]),
        (b"[{}, 12345678901234567890]", ["1:2", "1:6"]),
        (b"[" * 100_000, ["1 cannot be read as JSON"]),
        (b"[{}," + b"[" * 100_000, ["1:2", "1 cannot be read as JSON"]),
        (b"[{}," + b"9" * 5000 + b"]", ["1:2", "1 cannot be read as JSON"]),
        (b"[1]\n{}", ["1", "2"]),
        (b"", []),
        (b"\xef\xbb\xbf \n", []),
    ],
)
@pytest.mark.parametrize("size", [8, 1 << 16])
def test_every_problem_is_reported_with_its_position(chunk, data, places, size):
    chunk(size)
    reports = [f"{v.place} {v.problem}".strip() for v in read(data)]
    assert len(reports) == len(places)
    for report, place in zip(reports, places, strict=True):
        assert report.startswith(place)
        assert " " in place or report == place


def test_skipped_lines_are_not_parsed_but_a_damaged_array_is_reported():
    assert [v.place for v in read(b'"a"\nnot JSON\n"b"', skip=2)] == ["3"]
    assert [v.place for v in read(b'["a",\n"b",\n"c"]', skip=2)] == ["3:1"]
    assert [v.place for v in read(b'["a",\nb, "c"]', skip=5)] == ["2:1"]


def test_files_ending_in_gz_are_decompressed(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz", "A.JSONL.GZ"):
        path = tmp_path / name
        packed = name.lower().endswith("gz")
        path.write_bytes(gzip.compress(b"{}\n") if packed else b"{}\n")
        with open_records(path) as file:
            assert list(read_values(file)) == [JsonValue(1, value={})]


def test_lines_that_each_hold_a_list_are_values():
    lists = [[{"role": "user", "content": text}] for text in "ab"]
    data = "".join(f"{json.dumps(value)}\n\n" for value in lists)
    assert read(data.encode()) == [
        JsonValue(1, None, lists[0]),
        JsonValue(3, None, lists[1]),
    ]
