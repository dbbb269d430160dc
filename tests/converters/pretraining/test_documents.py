"""Corpus files of every format yield the same documents; errors name file and record.

The files are written with gzip, zstandard, json and pyarrow.
"""

import gzip
import json
import os
import random
import subprocess
import sys

import pytest

pyarrow = pytest.importorskip("pyarrow", reason="needs the torch extra")
zstandard = pytest.importorskip("zstandard", reason="needs the torch extra")

from pyarrow import parquet  # noqa: E402

from converters.pretraining import documents  # noqa: E402
from converters.pretraining.documents import (  # noqa: E402
    Damage,
    DamagedFileError,
    Unit,
    inspect_file,
    is_plain_text,
    split_documents,
)
from mlx_openelm.errors import OpenELMError  # noqa: E402
from mlx_openelm.text import line_ranges, record_files  # noqa: E402

TEXTS = [
    f'Document {i}: “ünï” \U0001f409\u2028 \\ "x"\r\n\n[{{,}}] end' for i in range(40)
]
TEXTS[3], TEXTS[7] = "", "long " * 40_000


def write(path, texts=TEXTS, key="text"):
    """Write texts in the format of the file's suffix."""
    records = [{"id": i, key: text, "meta": {"n": [i]}} for i, text in enumerate(texts)]
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=7)
        return path
    if "array" in name:
        data = json.dumps(records, indent=1 if "indented" in name else None)
    elif name.endswith((".txt", "README")):
        data = "".join(texts)
    else:
        data = "\n".join(json.dumps(r, ensure_ascii="ascii" in name) for r in records)
        data = data.replace("\n", "\n\n", 3)  # blank lines are skipped
    data = data.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, compresslevel=1)
    if path.suffix == ".zst":
        half = len(data) // 2  # two frames, as parallel tools write
        data = b"".join(map(zstandard.compress, (data[:half], data[half:])))
    path.write_bytes(data)
    return path


def read_documents(path, **options):
    """Yield a whole file's documents, and raise the error of the first damage."""
    for item in documents.read_documents(Unit(path), **options):
        if isinstance(item, Damage):
            item.drop(path, "stop")
        yield item


@pytest.mark.parametrize(
    "name",
    [
        *("a.jsonl", "ascii.json", "a.ndjson", "a.json.gz", "a.jsonl.gz"),
        *("a.jsonl.zst", "a.json.zst", "a.parquet"),
        *("array.json", "array-indented.json.gz", "array.json.zst"),
    ],
)
def test_every_format_yields_the_texts_from_any_position(tmp_path, name):
    path = str(write(tmp_path / name, key="content"))
    assert list(read_documents(path, text_key="content")) == TEXTS
    for start in (1, 7, 20, 39, 40, 41):
        texts_read = list(read_documents(path, text_key="content", start=start))
        assert texts_read == TEXTS[start:]
    assert not is_plain_text(path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "README"])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path, name):
    path = str(write(tmp_path / name, ["A\r\nTITLE\n", " x "]))
    assert list(read_documents(path)) == ["A\r\nTITLE\n x "]
    assert list(read_documents(path, start=1)) == []
    assert is_plain_text(path)


def test_headings_start_documents_and_stay_together(tmp_path):
    text = (
        "\nA preface.\n\nPART ONE\n\nTHE FOX\n\nA fox RAN.\n\nTHE CROW\nA crow sat.\n"
    )
    (tmp_path / "book.txt").write_text(text)
    expected = [
        "A preface.",
        "PART ONE\n\nTHE FOX\n\nA fox RAN.",
        "THE CROW\nA crow sat.",
    ]
    texts_read = list(
        read_documents(str(tmp_path / "book.txt"), document_start="[A-Z ]{4,}")
    )
    assert texts_read == expected
    assert list(split_documents(["A\n", "\n"], "B")) == ["A"]
    assert list(split_documents([" \n", "\n"], "B")) == []
    assert list(split_documents(["x\n", "B"], "B")) == ["x", "B"]


def test_a_byte_order_mark_is_skipped(tmp_path):
    for name, data in (("a.jsonl", b'{"text": "x"}'), ("b.json", b'[{"text": "x"}]')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data)
        assert list(read_documents(str(tmp_path / name))) == ["x"]


def test_headings_are_matched_in_files_with_crlf(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffI\r\none\r\nII\r\ntwo\r\n".encode())
    assert list(read_documents(str(path), document_start="I+")) == [
        "I\r\none",
        "II\r\ntwo",
    ]


def test_an_invalid_regular_expression_is_reported(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    with pytest.raises(OpenELMError, match="document_start is '\\('"):
        list(read_documents(str(path), document_start="("))


def test_suffixes_are_case_insensitive(tmp_path):
    path = tmp_path / "A.JSONL.GZ"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert list(read_documents(str(path))) == ["a"]
    assert not is_plain_text(str(path))
    assert is_plain_text("a.jsonl.txt.gz")


# Units ---------------------------------------------------------------------------


def read_units(path, count, start=0, **options):
    """Return the items of each of `count` units of a file."""
    units = [Unit(str(path), index, count) for index in range(count)]
    return [
        list(documents.read_documents(unit, start=start, **options)) for unit in units
    ]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "ascii.json", "a.json.gz", "a.jsonl.zst", "a.parquet"]
)
@pytest.mark.parametrize("count", [1, 2, 3, 6, 17, 90])
def test_the_units_of_a_file_have_each_document_once(tmp_path, name, count):
    path = write(tmp_path / name)
    form = inspect_file(str(path))
    cheap, most = form.cheap_parts, form.most_parts
    assert form.text_bytes > 190_000
    if name.endswith("parquet"):
        assert (cheap, most) == (6, 40)  # row groups and rows
    else:
        packed = name.endswith(("gz", "zst"))
        assert most == form.text_bytes
        assert cheap == (8 if packed else most)
    units = read_units(path, count)
    assert sorted(text for texts in units for text in texts) == sorted(TEXTS)
    if name.endswith("parquet") and count > 40:
        assert max(map(len, units)) == 1
    if ".gz" not in name and ".zst" not in name:
        assert [text for texts in units for text in texts] == TEXTS
    for start in (1, 4, 50):
        assert read_units(path, count, start) == [texts[start:] for texts in units]


def test_a_range_may_begin_at_any_byte_of_a_file(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ["\ufeff" + json.dumps({"text": "é"}, ensure_ascii=False)]
    lines += ["", "  ", *(json.dumps({"text": str(i)}) for i in range(5)), ""]
    path.write_bytes("\n".join(lines).encode())
    texts = ["é", *"01234"]
    for count in range(1, path.stat().st_size + 3):
        units = read_units(path, count)
        assert [text for each in units for text in each] == texts, count


def test_files_that_cannot_be_cut_have_one_part(tmp_path):
    for name in ("array.json", "array-indented.json.gz", "a.txt", "a.txt.gz"):
        assert inspect_file(str(write(tmp_path / name))).most_parts == 1
    for name in ("missing.jsonl", "missing.parquet", "cut.parquet"):
        if name.startswith("cut"):
            (tmp_path / name).write_bytes(b"PAR1")
        assert inspect_file(str(tmp_path / name)).most_parts == 1
    indented = tmp_path / "indented.jsonl"
    indented.write_text(json.dumps({"text": "a"}, indent=1) * 3)
    assert inspect_file(str(indented)).most_parts == 1


def test_skipped_and_foreign_lines_are_not_parsed(tmp_path, monkeypatch):
    parsed = []

    def parse(line):
        parsed.append(line)
        return json.loads(line)

    monkeypatch.setattr(record_files, "parse_json", parse)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        path = write(tmp_path / name)
        for count, start in ((1, 0), (4, 0), (1, 8), (4, 8)):
            parsed.clear()
            units = read_units(path, count, start)
            assert len(parsed) == sum(map(len, units))


# Damage --------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [b'{"text": "b"}', b"]", b" " * (1 << 17) + b"x"])
def test_data_after_an_array_is_reported(tmp_path, rest):
    path = tmp_path / "array.json.gz"
    array = b'[{"text": "a"}]\n'
    path.write_bytes(gzip.compress(array) + gzip.compress(rest))
    reader = read_documents(str(path))
    assert next(reader) == "a"
    with pytest.raises(DamagedFileError, match=r"Record 2 .* after the end"):
        next(reader)
    path.write_bytes(gzip.compress(array)[:-3])  # without its checksum
    with pytest.raises(DamagedFileError, match="truncated"):
        list(read_documents(str(path)))


def read_until_damage(path, **options):
    texts_read = []

    def read():
        for document in read_documents(str(path), **options):
            texts_read.append(document)  # keep those before the error

    with pytest.raises(DamagedFileError) as caught:
        read()
    message = str(caught.value)
    assert str(path) in message
    assert message.endswith(".")
    return texts_read, message


@pytest.mark.parametrize(
    "name", ["a.json.gz", "a.jsonl.zst", "a.txt.gz", "array.json.gz"]
)
def test_a_truncated_file_is_read_up_to_its_end(tmp_path, name):
    texts = [os.urandom(500).hex() for _ in range(1000)]  # nothing to compress twice
    path = write(tmp_path / name, texts)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])
    texts_read, _ = read_until_damage(path)
    assert texts_read == texts[: len(texts_read)]
    if "txt" not in name:
        assert 300 < len(texts_read) < 950


def test_truncated_and_trailing_zstd_data_are_detected(tmp_path):
    path = write(tmp_path / "a.jsonl.zst")
    path.write_bytes(path.read_bytes() + b"nonsense")
    texts_read, _ = read_until_damage(path)
    assert texts_read == TEXTS[:-1]  # the last line is incomplete
    frame = zstandard.compress(b'{"text": "one"}\n')
    path.write_bytes(frame + frame[:-3])
    texts_read, message = read_until_damage(path)
    assert texts_read[0] == "one"
    assert "middle of a frame" in message


def test_damaged_parquet_is_reported(tmp_path):
    path = write(tmp_path / "a.parquet")
    data = path.read_bytes()
    path.write_bytes(data[:-200])  # without the footer
    assert read_until_damage(path)[0] == []
    path.write_bytes(b"")
    assert read_until_damage(path)[0] == []
    path.write_bytes(data)
    table = parquet.ParquetFile(path)
    offset = table.metadata.row_group(3).column(1).data_page_offset
    table.close()
    path.write_bytes(data[:offset] + bytes(64) + data[offset + 64 :])
    texts_read, message = read_until_damage(path)
    assert texts_read == TEXTS[: len(texts_read)]
    assert "Record 22" in message
    assert list(read_documents(str(path), start=28)) == TEXTS[28:]  # not affected
    assert (
        "no column 'body', only id, text, meta"
        in read_until_damage(write(path), text_key="body")[1]
    )
    parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    texts_read, message = read_until_damage(path)
    assert texts_read == ["a"]
    assert f"Record 2 of {path} has a 'text' that is not a string" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "cut', "not JSON"),
        ('{"text": 5}', "not a string"),
        ('{"text": null}', "not a string"),
        ('{"content": "a", "id": 1}', "has no 'text'; its keys: content, id"),
        ('"a string"', "not an object"),
        ("{" * 100_000, "not JSON"),
        (b'{"text": "\xff"}', ":11 is not UTF-8 (the byte 0xff)"),
    ],
)
def test_a_bad_record_is_reported_with_its_number(tmp_path, line, expected):
    good = json.dumps({"text": "good"}).encode()
    line = line if isinstance(line, bytes) else line.encode()
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b"\n".join([good, good, line, good]))
    texts_read, message = read_until_damage(lines)
    assert texts_read == ["good"] * 2
    assert "Record 3" in message
    assert expected in message
    array = tmp_path / "a.json"
    array.write_bytes(b"[" + b",\n".join([good, good, line, good]) + b"]")
    texts_read, message = read_until_damage(array)
    assert texts_read == ["good"] * 2
    assert "Record 3" in message
    assert expected in message


def test_missing_and_binary_files_are_reported(tmp_path):
    path = tmp_path / "a.txt"
    assert "a.txt" in read_until_damage(path)[1]
    path.write_bytes(b"fine \xff\xfe")
    assert f"{path} cannot be read as UTF-8" in read_until_damage(path)[1]


def test_a_missing_package_is_not_a_damaged_file(tmp_path, monkeypatch):
    for name, package in (("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")):
        path = write(tmp_path / name)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            OpenELMError, match=rf"package {package}.*\[torch\]"
        ) as caught:
            list(read_documents(str(path)))
        assert not isinstance(caught.value, DamagedFileError)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_damaged_record_is_one_item_among_the_others(tmp_path, name, count):
    bad = [
        b'{"text": "cut',
        b'{"text": 5}',
        b'{"content": "a"}',
        b"[1]",
        b'{"text": "\xff"}',
    ]
    good = [json.dumps({"text": f"n{i}"}).encode() for i in range(20)]
    lines = [*good[:4], bad[0], *good[4:9], *bad[1:], *good[9:]]
    data = b"\n".join([*lines[:3], b"", *lines[3:]])
    path = tmp_path / name
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix)
    path.write_bytes(compress(data) if compress else data)
    items = [item for unit in read_units(path, count) for item in unit]
    texts = [item for item in items if isinstance(item, str)]
    assert sorted(texts) == sorted(f"n{i}" for i in range(20))
    damages = [item for item in items if isinstance(item, Damage)]
    places = sorted(damage.describe(str(path)) for damage in damages)
    records = sorted([5, 11, 12, 13, 14], key=str)
    for place, record in zip(places, records, strict=True):  # one blank line before
        assert place.startswith(f"Record {record} of {path}:{record + 1}")
    with pytest.raises(DamagedFileError, match="Record 5 "):
        list(read_documents(str(path)))


@pytest.mark.parametrize("count", [1, 3])
def test_a_record_that_is_too_large_is_one_item(tmp_path, monkeypatch, count):
    monkeypatch.setattr(record_files, "MAX_RECORD_BYTES", 2000)
    monkeypatch.setattr(line_ranges, "MAX_RECORD_BYTES", 2000)
    monkeypatch.setattr(record_files, "_CHUNK", 64)
    texts = [f"n{i}" for i in range(9)]
    texts[4] = "x" * 9000
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = write(tmp_path / name, texts)
        items = [item for unit in read_units(path, count) for item in unit]
        kept = [item for item in items if isinstance(item, str)]
        assert sorted(kept) == [t for t in texts if len(t) < 9]
        (damage,) = (item for item in items if isinstance(item, Damage))
        assert "larger than" in damage.describe(str(path))
        assert "Record 5 of" in damage.describe(str(path))
        assert not damage.is_rest


def test_rows_of_a_damaged_row_group_are_items_and_the_next_group_is_read(tmp_path):
    path = write(tmp_path / "a.parquet")
    data = path.read_bytes()
    with parquet.ParquetFile(path) as table:
        offset = table.metadata.row_group(3).column(1).data_page_offset
    path.write_bytes(data[:offset] + bytes(64) + data[offset + 64 :])
    for count in (1, 2, 6, 7, 23, 40):
        units = read_units(path, count)
        items = [item for unit in units for item in unit]
        lost = [i for i in range(40) if isinstance(items[i], Damage)]
        assert lost == list(range(21, 28))
        assert [items[i].record for i in lost] == [i + 1 for i in lost]
        assert [items[i] for i in range(40) if i not in lost] == TEXTS[:21] + TEXTS[28:]
        for start in (3, 22, 30):
            assert read_units(path, count, start) == [unit[start:] for unit in units]


def test_a_bad_element_of_an_array_is_one_item_and_bad_syntax_ends_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": 5}, 7, {"text": "b"}, {"text" "c"}, {}]')
    (items,) = read_units(path, 1)
    assert [isinstance(item, Damage) and item.is_rest for item in items] == [
        *(False, False, False, False, True),
    ]
    assert [item for item in items if isinstance(item, str)] == ["a", "b"]
    assert items[1].drop("a.json", "skip") == "damaged records of a.json"
    assert items[4].drop("a.json", "skip") == "rest of a.json, damaged"


# Memory --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["array.json.zst", "a.jsonl.gz", "a.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    def peak(count):
        path = tmp_path / f"{count}-{name}"
        rng = random.Random(count)
        words = [str(rng.random()) for _ in range(5000)]
        write(path, [" ".join(rng.choices(words, k=500)) for _ in range(count)])
        program = (
            "import resource, sys\n"
            "from converters.pretraining.documents import Unit, read_documents\n"
            "texts = read_documents(Unit(sys.argv[1]))\n"
            "assert sum(1 for _ in texts) == int(sys.argv[2])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", program, str(path), str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        kib = int(done.stdout) // (1024 if sys.platform == "darwin" else 1)
        return kib / 1024

    assert peak(4000) - peak(100) < 15  # MiB; the texts have 36
