"""Answers in a file are in order and complete after a kill at any step."""

import contextlib
import itertools
import json
import random
from functools import partial
from pathlib import Path

import pytest

from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.appended_jsonl import JsonLinesFile, to_line
from mlx_openelm.storage.ordered_jsonl import AnswersFile


class Killed(BaseException):
    pass


class Disk:
    """Simulates a kill before or during a write, `share` of a line being written."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.steps, self.killed_at, self.share = folder, 0, None, 0.0
        self._files = {}
        append, truncate = JsonLinesFile.append, JsonLinesFile.truncate

        def append_or_kill(file, answer):
            if self.is_last_step():
                line = to_line(answer).encode() + b"\n"
                with file.path.open("ab") as opened:
                    opened.write(line[: int(self.share * len(line))])
                self.kill()
            append(file, answer)

        def truncate_or_kill(file, size):
            if self.is_last_step():
                self.kill()
            truncate(file, size)

        monkeypatch.setattr(JsonLinesFile, "append", append_or_kill)
        monkeypatch.setattr(JsonLinesFile, "truncate", truncate_or_kill)

    def is_last_step(self):
        self.steps += 1
        return self.steps - 1 == self.killed_at

    def kill(self):
        self._files = {p: p.read_bytes() for p in self.folder.iterdir()}
        raise Killed

    def restore(self):
        """Undo the cleanup after the kill, which a real kill prevents."""
        for path in self.folder.iterdir():
            path.unlink()
        for path, data in self._files.items():
            path.write_bytes(data)


def line_of(place, text="answer"):
    return {"line": place + 1, "text": f"{text} {place} \xe9", "key": f"k{place}"}


def note(done, place):
    done.append(place)
    return line_of(place)


def find_place(answer):
    place = answer["line"] - 1
    known = answer in (line_of(place), {"line": place + 1, "error": "bad"})
    return place if known else None


def write_answers(path, order, make=line_of, find_place=find_place, **options):
    """Write the missing answers in this order; return those that were passed on."""
    passed_on = []
    opened = AnswersFile(path, find_place, passed_on.append, **options)
    with opened as answers:
        for place in order:
            if place not in answers:
                answers.add(place, make(place))
    return passed_on


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
def test_a_kill_at_any_step_loses_no_complete_answer(tmp_path, monkeypatch, share):
    disk = Disk(tmp_path, monkeypatch)
    disk.share = share
    path, count = tmp_path / "answers.jsonl", 7
    for seed in range(4):
        chance = random.Random(seed)
        order = chance.sample(range(count), count)
        for first in itertools.count():
            disk.steps, disk.killed_at, done = 0, first, []
            make = partial(note, done)
            try:
                write_answers(path, order, make)
                break
            except Killed:
                disk.restore()
            # The resumed run is killed as well, in its first steps.
            disk.steps, disk.killed_at = 0, chance.randrange(6)
            try:
                write_answers(path, chance.sample(order, count), make)
            except Killed:
                disk.restore()
            disk.steps, disk.killed_at = 0, None
            write_answers(path, order, make)
            assert lines_of(path) == [line_of(place) for place in range(count)]
            assert [p.name for p in tmp_path.iterdir()] == ["answers.jsonl"]
            assert len(done) <= count + 2  # what was being written, at most
            path.unlink()
        assert first > count
        path.unlink()


def test_answers_after_a_gap_are_kept(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    path = tmp_path / "answers.jsonl"
    for steps in itertools.count():
        lines = [line_of(0), {"line": 2, "error": "It was."}, line_of(2), line_of(3)]
        path.write_text("".join(to_line(a) + "\n" for a in lines))
        disk.steps, disk.killed_at, done = 0, steps, []
        with contextlib.suppress(Killed):
            write_answers(path, range(5), partial(note, done))
        killed = disk.steps > steps
        if killed:
            disk.restore()
            disk.killed_at = None
            write_answers(path, range(5), partial(note, done))
        assert lines_of(path) == [line_of(place) for place in range(5)]
        assert set(done) == {1, 4}
        if not killed:
            break
    assert steps > 6


def test_a_truncated_line_is_written_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    write_answers(path, range(3))
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        passed_on = write_answers(path, range(3))
        assert path.read_bytes() == whole
        assert len(passed_on) == 3 - whole[:size].count(b"\n")


def test_answers_of_another_run_are_replaced_only_with_force(tmp_path):
    path = tmp_path / "answers.jsonl"
    write_answers(path, [0, 1, 3])
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for known in (lambda a: None, lambda a: 1, lambda a: a["line"] - 1 or None):
        with pytest.raises(OpenELMError, match=r"other settings .*`force`"):
            write_answers(path, [2], find_place=known)
        assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    write_answers(path, [0], find_place=lambda a: None, force=True)
    assert lines_of(path) == [line_of(0)]
    assert [p.name for p in tmp_path.iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize(
    "data", [b"a diary\n", b"[]\n", b'{"line": 1}\n', b'{"line": [], "key": "a"}\n']
)
def test_a_file_of_another_kind_is_not_changed(tmp_path, data):
    path = tmp_path / "diary"
    path.write_bytes(data)
    for force in (False, True):
        with pytest.raises(OpenELMError, match="diary:1 is not an answer to a prompt"):
            write_answers(path, range(3), force=force)
        assert path.read_bytes() == data
    with pytest.raises(OpenELMError, match="is not a file"):
        write_answers(tmp_path, range(3))
    with pytest.raises(OpenELMError, match="Cannot write"):
        write_answers(path / "below", range(3))


def test_only_one_run_writes_to_a_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswersFile(path, find_place, print) as answers:
        answers.add(0, line_of(0))
        with pytest.raises(OpenELMError, match="in use by another process"):
            write_answers(path, range(3))
    assert lines_of(path) == [line_of(0)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported(tmp_path):
    path = tmp_path / "answers.jsonl"
    with (
        contextlib.closing(JsonLinesFile(Path("/dev/full"))) as full,
        AnswersFile(path, find_place, lambda answer: None) as answers,
    ):
        answers.add(0, line_of(0))
        answers.add(1, line_of(1))
        file, answers._file = answers._file, full
        with pytest.raises(OpenELMError, match=r"The disk of .* is full; free disk"):
            answers.add(2, line_of(2))
        answers._file = file
    assert lines_of(path) == [line_of(0), line_of(1)]
