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

from converters.pretraining.corpus_files import (  # noqa: E402
    DamagedFileError,
    expand_ranges,
    find_files,
    is_plain_text,
    read_documents,
    split_documents,
)
from mlx_openelm.errors import OpenELMError  # noqa: E402

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
        data = gzip.compress(data)
    if path.suffix == ".zst":
        half = len(data) // 2  # two frames, as parallel tools write
        data = b"".join(map(zstandard.compress, (data[:half], data[half:])))
    path.write_bytes(data)
    return path


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
    documents = [
        "A preface.",
        "PART ONE\n\nTHE FOX\n\nA fox RAN.",
        "THE CROW\nA crow sat.",
    ]
    texts_read = list(
        read_documents(str(tmp_path / "book.txt"), document_start="[A-Z ]{4,}")
    )
    assert texts_read == documents
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
    documents, texts_read = read_documents(str(path), **options), []

    def read():
        for document in documents:
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
    assert f"{path} as UTF-8" in read_until_damage(path)[1]


def test_a_missing_package_is_not_a_damaged_file(tmp_path, monkeypatch):
    for name, package in (("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")):
        path = write(tmp_path / name)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            OpenELMError, match=rf"package {package}.*\[torch\]"
        ) as caught:
            list(read_documents(str(path)))
        assert not isinstance(caught.value, DamagedFileError)


# Patterns ------------------------------------------------------------------------


def test_ranges_keep_their_leading_zeros():
    assert expand_ranges("a-{08..11}.gz") == [
        *("a-08.gz", "a-09.gz", "a-10.gz", "a-11.gz"),
    ]
    assert expand_ranges("{0..1}/{00000..00001}") == [
        *("0/00000", "0/00001", "1/00000", "1/00001"),
    ]
    assert expand_ranges("{9..10}") == ["9", "10"]
    assert expand_ranges("{a,b}*") == ["{a,b}*"]
    for wrong in ("{5..4}", "{0..999999999999}"):
        with pytest.raises(OpenELMError, match="range"):
            expand_ranges(wrong)


def test_files_are_listed_once_in_order_without_excluded_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/00.txt", "b/01.txt", "a.txt", "b/c/d.txt", "we[i]rd.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    every = ("a.txt", "b/00.txt", "b/01.txt", "b/c/d.txt", "we[i]rd.txt")
    assert find_files(["**/*.txt", "a.txt", "b/{00..01}.txt"]) == every
    assert find_files(["**"]) == every  # no folders
    some = find_files(["**/*.txt"], ["d.txt", "b/{00..00}.txt", "we*"])
    assert some == ("a.txt", "b/01.txt")
    assert find_files(["we[i]rd.txt"]) == ("we[i]rd.txt",)
    with pytest.raises(OpenELMError, match=r"No file matches '\*\.md'"):
        find_files(["*.txt", "*.md"])
    with pytest.raises(OpenELMError, match="excludes all of its files"):
        find_files(["*.txt"], ["*"])


@pytest.mark.parametrize(
    "heldout",
    ["data/held.txt", "./data/h*.txt", "data/**/held.txt", "data/../data/held.txt"],
)
def test_held_out_files_are_excluded_by_any_path(tmp_path, monkeypatch, heldout):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("a.txt", "held.txt", "deep/b.txt"):
        (tmp_path / "data" / name).write_text(name)
    for train in ("data/*.txt", "./data/*.txt", f"{tmp_path}/data/*.txt"):
        (left,) = find_files([train], [heldout])
        assert left.endswith("a.txt")
    both = find_files(["data/**/*.txt"], ["data/*.txt"])
    assert both == ("data/deep/b.txt",)  # a star does not match folders


def test_a_name_with_brackets_can_be_held_out(tmp_path):
    for name in ("a[1].txt", "b.txt"):
        (tmp_path / name).write_text(name)
    left = find_files([f"{tmp_path}/*.txt"], [f"{tmp_path}/a[1].txt"])
    assert left == (f"{tmp_path}/b.txt",)


def test_a_file_with_several_paths_is_listed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to("a.txt")
    assert len(find_files(["a.txt", "./a.txt", f"{tmp_path}/a.txt", "l*"])) == 1


def test_missing_and_too_long_patterns_are_reported():
    with pytest.raises(OpenELMError, match="names no files"):
        find_files([])
    with pytest.raises(OpenELMError, match="No file matches"):
        find_files(["a" * 5000])


def test_missing_files_of_ranges_are_counted_and_reported_at_once(tmp_path):
    for i in (0, 2):
        (tmp_path / f"{i:02}.txt").touch()
    with pytest.raises(OpenELMError) as caught:
        find_files([f"{tmp_path}/{{00..03}}.txt", f"{tmp_path}/x{{1..7}}.txt"])
    message = str(caught.value)
    assert message.startswith("9 files of the recipe's data are missing: ")
    assert f"{tmp_path}/01.txt, {tmp_path}/03.txt, {tmp_path}/x1.txt" in message
    assert "and 4 more" in message


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
            "from converters.pretraining.corpus_files import read_documents\n"
            "assert sum(1 for _ in read_documents(sys.argv[1])) == int(sys.argv[2])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", program, str(path), str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        kib = int(done.stdout) // (1024 if sys.platform == "darwin" else 1)
        return kib / 1024

    assert peak(4000) - peak(100) < 15  # MiB; the texts have 36
