"""Files are found by patterns; missing ones are reported."""

import pytest

from converters.pretraining.corpus_files import (
    contract_ranges,
    expand_ranges,
    find_files,
)
from mlx_openelm.errors import OpenELMError


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


def test_consecutive_files_are_written_as_a_range():
    names = [
        "a1",
        "a2",
        "a3",
        "a5",
        "b5",
        "b-01-02",
        "b-02-02",
        "b-02-03",
        "x09",
        "x10",
    ]
    assert contract_ranges(names) == [
        *("a{1..3}", "a5", "b5", "b-{01..02}-02", "b-02-03", "x{09..10}"),
    ]
    for pattern in ("p-{0..12}-of-{3..5}.gz", "x-{0007..0123}-of-0123"):
        expanded = expand_ranges(pattern)
        again = [n for name in contract_ranges(expanded) for n in expand_ranges(name)]
        assert again == expanded
    assert contract_ranges([]) == []
