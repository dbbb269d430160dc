import gzip
import io
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import UNEVEN, build, small_tokenizer

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.batch_job import answer_prompts
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.prompt_file import (
    ARRAY,
    JSONL,
    LINES,
    Prompt,
    read_prompts,
)
from mlx_openelm.generation.streaming import generate
from mlx_openelm.text.templates import Turn
from mlx_openelm.text.tokenizer import Tokenizer

tokenizer = small_tokenizer()
model = build(UNEVEN)
SHORT = Sampling(max_tokens=6, logit_bias=((tokenizer.eos_id, 2.0),))


# Reading ---------------------------------------------------------------------------


def read(data: bytes, name="prompts.jsonl", folder=None):
    path = Path(folder) / name
    path.write_bytes(data)
    return read_prompts(path)


def test_a_line_is_a_text_an_object_or_a_conversation(tmp_path):
    result = read(
        b'\xef\xbb\xbf{"prompt": "a king", "id": "k1"}\r\n'
        b"\n   \r\n"
        b'"a \\u00e9 queen"\n'
        b'{"id": 7, "messages": [{"role": "system", "content": ""}, '
        b'{"role": "user", "content": "Hi"}]}',
        folder=tmp_path,
    )
    assert result.format == JSONL
    assert result.prompts == (
        Prompt(1, "1", "a king", "k1"),
        Prompt(4, "4", "a \xe9 queen"),
        Prompt(5, "5", (Turn("system", ""), Turn("user", "Hi")), 7),
    )


@pytest.mark.parametrize("name", ["p.json", "p.json.gz", "p.JSONL", "p", "-"])
def test_each_element_of_an_array_is_a_prompt(tmp_path, monkeypatch, name):
    data = (
        b'\xef\xbb\xbf[\n  {"prompt": "a king", "id": 1}, "a queen",\n'
        b'  {"promt": 1}, {"prompt": "a wolf"}\n]\n'
    )
    if name == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        result = read_prompts(name)
    else:
        packed = gzip.compress(data) if name.endswith("gz") else data
        result = read(packed, name, tmp_path)
    assert result.format == ARRAY
    problem = result.prompts[2].problem
    assert 'needs "prompt" or "messages"' in problem
    assert result.prompts == (
        Prompt(1, "2:3", "a king", 1),
        Prompt(2, "2:34", "a queen"),
        Prompt(3, "3:3", problem=problem),
        Prompt(4, "3:17", "a wolf"),
    )


def test_a_damaged_array_is_answered_up_to_the_damage(tmp_path):
    prompts = read(b'[{"prompt": "a king"},\n {"prompt" 1}]', "p.json", tmp_path)
    problems, given = [], []
    answer_prompts(
        model,
        tokenizer,
        prompts,
        SHORT,
        on_answer=given.append,
        on_problem=problems.append,
    )
    assert given[0]["text"] == generate(model, tokenizer, "a king", SHORT)
    problem = "Line 2, column 12 is not JSON (Expecting ':' delimiter)."
    assert given[1] == {"line": 2, "error": problem}
    assert problems == [f"{tmp_path / 'p.json'}:2:12: {problem}"]


@pytest.mark.parametrize("name", ["p.txt.gz", "p.jsonl.gz"])
def test_a_compressed_file_is_decompressed(tmp_path, name):
    result = read(gzip.compress(b'"one"\n\n"two"'), name, tmp_path)
    assert result.format == (LINES if "txt" in name else JSONL)
    assert [p.content.strip('"') for p in result.prompts] == ["one", "two"]
    assert [p.place for p in result.prompts] == ["1", "3"]
    with pytest.raises(OpenELMError, match="Cannot read the prompts of"):
        read(gzip.compress(b'"one"')[:-3], name, tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "format"),
    [
        ("p.jsonl", b'"a"\nplain', JSONL),
        ("p.NDJSON", b"plain", JSONL),
        ("p.txt", b'{"prompt": "a"}', LINES),
        ("p", b'\n {"prompt": "a', JSONL),
        ("p", b'"a text"', JSONL),
        ("p", b'"Come in," said the wolf', LINES),
        ("p", b"[1, 2]", LINES),
        ("p", b"[a note] Once", LINES),
        ("p.json", b"plain", JSONL),
        ("p", b'\n["a", "b"]', ARRAY),
        ("p.txt", b'[{"prompt": "a"}]', ARRAY),
        ("p.txt", b'[{"prompt": "a"},\n{"prompt": "b"}]', ARRAY),
        ("p.txt.gz", b'[\n\n "a",\n"b"]\n', ARRAY),
        ("p.txt", b'["a", "b"]\n["c", "d"]\n', LINES),
        ("p.txt", b'["Come in," said the wolf]\n', LINES),
        ("p.txt", b"[\nthe first verse", LINES),
        ("p.txt", b"[1]\n", LINES),
        ("p.jsonl", b"[1]\n[2]\n", JSONL),
        ("p.jsonl", b"[1]\n\n", ARRAY),
        ("p.md", b"a king", LINES),
    ],
)
def test_the_suffix_or_the_first_line_gives_the_format(tmp_path, name, data, format):
    assert read(data, name, tmp_path).format == format


def test_prompts_are_read_from_stdin(monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"one\ntwo"))
    monkeypatch.setattr(sys, "stdin", stdin)
    result = read_prompts("-")
    assert (result.name, [p.content for p in result.prompts]) == (
        "stdin",
        ["one", "two"],
    )


plain = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\ufeff"),
    max_size=20,
).filter(lambda text: not text.lstrip().startswith("["))  # "[{" can be an array


@settings(max_examples=200)
@given(st.lists(plain), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_plain_lines_are_read_unchanged(tmp_path_factory, texts, end, bom, last):
    filled = [(n, t) for n, t in enumerate(texts, 1) if t.encode().strip()]
    data = end.join(texts) + end * last
    folder = tmp_path_factory.getbasetemp()
    if not filled:
        with pytest.raises(OpenELMError, match="no prompts"):
            read(data.encode(), "p.txt", folder)
        return
    result = read(b"\xef\xbb\xbf" * bom + data.encode(), "p.txt", folder)
    assert [(p.number, p.content) for p in result.prompts] == filled


@settings(max_examples=200)
@given(st.lists(plain.filter(str.strip), min_size=1), st.booleans())
def test_json_lines_are_read_unchanged(tmp_path_factory, texts, ascii):
    values = [t if n % 2 else {"prompt": t} for n, t in enumerate(texts)]
    data = "\n".join(json.dumps(v, ensure_ascii=ascii) for v in values).encode()
    result = read(data, folder=tmp_path_factory.getbasetemp())
    assert [p.content for p in result.prompts] == texts


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=30) | st.sampled_from([b"{", b'"a"', b"[[[", b"0"])))
def test_any_bytes_give_prompts_problems_or_one_error(tmp_path_factory, lines):
    try:
        result = read(b"\n".join(lines), folder=tmp_path_factory.getbasetemp())
    except OpenELMError:
        data = b"".join(lines).removeprefix(b"\xef\xbb\xbf")
        if data.startswith(b"\x1f\x8b\x08"):  # compressed, and damaged
            return
        assert not data.strip() or re.fullmatch(rb"\s*\[\s*\]\s*", data)
        return
    for prompt in result.prompts:
        assert prompt.content or prompt.problem.endswith(".")


BAD = {
    b'{"prompt": "a"': "Line 1, column 15 is not JSON (Expecting ','",
    b"nope": "not JSON",
    b"[" * 100_000: "cannot be read as JSON",
    b"9" * 5000: "cannot be read as JSON",
    b'"caf\xe9"': ", column 5 is not UTF-8 (the byte 0xe9)",
    b"[1]": "The record is a list",
    b"null": "The record is null",
    b"3": "The record is a number",
    b"{}": "it has no keys",
    b'{"text": "a"}': "it has 'text'",
    b'{"prompt": null}': "needs",
    b'{"prompt": 3}': "The prompt is a number",
    b'{"prompt": " \\n"}': "The prompt is empty",
    b'""': "The prompt is empty",
    b'"\\ud800"': "The prompt contains the unpaired surrogate \\ud800",
    b'{"prompt": "a", "id": [1]}': "The id is a list",
    b'{"prompt": "a", "id": true}': "The id is true or false",
    b'{"prompt": "a", "id": 1.5}': "The id is a number; it must be",
    b'{"prompt": "a", "id": "\\udc00"}': "contains the unpaired surrogate \\udc00",
    b'{"prompt": "a", "messages": [1]}': '"prompt" and "messages"',
    b'{"messages": []}': "messages is an empty list",
    b'{"messages": "a"}': "messages is a string",
    b'{"messages": ["a"]}': "messages[0] is a string",
    b'{"messages": [{"role": "tool", "content": "a"}]}': "messages[0].role is 'tool'",
    b'{"messages": [{"role": [], "content": "a"}]}': "messages[0].role is []",
    b'{"messages": [{"role": "user"}]}': "messages[0] has no content",
    b'{"messages": [{"role": "user", "content": ""}]}': "messages[0].content is empty",
    b'{"messages": [{"role": "assistant", "content": "a"}]}': "the assistant's",
    b'{"messages": [{"role": "user", "content": "a"}, '
    b'{"role": "system", "content": "a"}]}': "The last message is the system's",
}


def test_every_invalid_line_is_reported_and_the_rest_is_answered(tmp_path):
    lines = [line for bad in BAD for line in (bad, b'"a king"')]
    prompts = read(b"\n".join(lines), folder=tmp_path)
    problems, given = [], []
    report = answer_prompts(
        model,
        tokenizer,
        prompts,
        SHORT,
        on_answer=given.append,
        on_problem=problems.append,
    )
    text = generate(model, tokenizer, "a king", SHORT)
    assert [answer["line"] for answer in given] == [*range(1, len(lines) + 1)]
    for number, (answer, words) in enumerate(
        zip(given[::2], BAD.values(), strict=True)
    ):
        line = 2 * number + 1
        assert words in answer["error"]
        location = f"{tmp_path / 'prompts.jsonl'}:{line}"
        assert problems[number] == f"{location}: {answer['error']}"
    assert {answer["text"] for answer in given[1::2]} == {text}
    assert report.problems == tuple(problems)
    assert (report.prompts, report.kept) == (len(lines), 0)


def test_prompts_that_do_not_fit_the_model_are_reported(tmp_path):
    data = b'"a king"\n"' + b"king " * 80 + b'"\n{"id": 1, "messages": ['
    data += b'{"role": "system", "content": "b"}, {"role": "user", "content": "c"}]}'
    prompts, given = read(data, folder=tmp_path), []
    report = answer_prompts(model, tokenizer, prompts, SHORT, on_answer=given.append)
    assert len(report.problems) == 2
    assert "the model's context is 64" in given[1]["error"]
    assert given[2]["id"] == 1
    assert "not a conversation" in given[2]["error"]


def test_invalid_settings_are_reported_once(tmp_path):
    prompts = read(b'"a king"', folder=tmp_path)
    with pytest.raises(OpenELMError, match="not support `system`"):
        answer_prompts(model, tokenizer, prompts, SHORT, system="Be kind.")
    with pytest.raises(OpenELMError, match="No template is called"):
        answer_prompts(model, tokenizer, prompts, SHORT, template="x")


@pytest.mark.parametrize("missing", ["nowhere.txt", ".", "\0"])
def test_an_unreadable_file_is_reported(missing):
    with pytest.raises(OpenELMError, match="Cannot read the prompts of"):
        read_prompts(missing)


# Answers ---------------------------------------------------------------------------


def test_an_answer_has_the_fields_of_generate(tmp_path):
    given = []
    sampling = Sampling(max_tokens=5, logprobs=2)
    prompts = read(b'{"prompt": "a king", "id": "x"}', folder=tmp_path)
    answer_prompts(model, tokenizer, prompts, sampling, on_answer=given.append)
    (answer,) = given
    assert {"line": 1, "id": "x"}.items() <= answer.items()
    assert answer["text"] == generate(model, tokenizer, "a king", sampling)
    assert answer["finish_reason"] == "length"
    assert answer["prompt_tokens"] == len(tokenizer.encode("a king"))
    assert answer["generation_tokens"] == len(answer["tokens"]) == 5
    assert [token["token"] for token in answer["logprobs"]] == answer["tokens"]
    for token in answer["logprobs"]:
        assert token["piece"] == tokenizer.piece(token["token"])
        assert token["top"][0]["logprob"] == token["logprob"]
        assert len(token["top"]) == 2
    assert json.loads(json.dumps(answer)) == answer


def test_turns_and_texts_get_the_template(tmp_path):

    templated = Tokenizer(tokenizer.model_proto, template="instruct")
    roomy = build(UNEVEN.__class__(**{**_fields(UNEVEN), "max_context_length": 512}))
    data = b'"Hi"\n{"messages": [{"role": "user", "content": "Hi"}]}\n'
    data += b'{"messages": [{"role": "system", "content": "Be kind."}, '
    data += b'{"role": "user", "content": "Hi"}]}'
    given = []
    for system in ("", "Be kind."):
        answer_prompts(
            roomy,
            templated,
            read(data, folder=tmp_path),
            SHORT,
            system=system,
            on_answer=given.append,
        )
    text, turns, kind_turns, kind, both, own = (a["prompt_tokens"] for a in given)
    assert text == turns < kind_turns == kind == both == own
    expected = generate(roomy, templated, "Hi", SHORT)
    assert given[0]["text"] == given[1]["text"] == expected


def _fields(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


# The output file -------------------------------------------------------------------


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(answers):
    times = ("prompt_tps", "generation_tps", "time_to_first_token_s")
    left_out = (*times, "peak_memory_bytes")
    return [{k: v for k, v in a.items() if k not in left_out} for a in answers]


def test_a_stopped_run_resumes(tmp_path):
    texts = [f'"king {n}"'.encode() for n in range(30)]
    texts[4:6] = [b'"\xff"', b'"' + b"king " * 80 + b'"']
    prompts = read(b"\n".join(texts), folder=tmp_path)
    sampling = Sampling(max_tokens=30, temp=1.0, seed=1, logit_bias=SHORT.logit_bias)
    options = {"model": model, "tokenizer": tokenizer, "prompts": prompts}

    def run(name, sampling=sampling, **more):
        path = tmp_path / name
        report = answer_prompts(**options, sampling=sampling, output=path, **more)
        return timeless(lines_of(path)), report

    whole, report = run("whole")
    assert (len(whole), len(report.problems), report.kept) == (30, 2, 0)
    for stop_at in (3, 9, 25):

        def stop(done, prompts, tokens, stop_at=stop_at):
            assert prompts == 30
            if done > stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as stopped:
            run("stopped", on_progress=stop)
        assert "The same command resumes from" in stopped.value.__notes__[0]
        again, second = run("stopped", batch_size=3)
        assert again == whole
        assert stop_at - 2 < second.kept < 28
        assert second.problems == report.problems
        assert second.tokens < report.tokens
        (tmp_path / "stopped").unlink()
    given, problems = [], []
    again, third = run("whole", on_answer=given.append, on_problem=problems.append)
    assert (given, third.kept, third.tokens) == ([], 28, 0)
    assert problems == list(report.problems)

    with pytest.raises(OpenELMError, match="`force`"):
        run("whole", sampling=Sampling(max_tokens=30))
    with pytest.raises(OpenELMError, match="`force`"):
        run("whole", sampling=sampling, template="instruct")
    options["model"] = build(UNEVEN, seed=1)
    with pytest.raises(OpenELMError, match="`force`"):
        run("whole")
    assert timeless(lines_of(tmp_path / "whole")) == whole
    assert run("whole", force=True)[0] != whole


def test_a_resumed_run_answers_only_corrected_and_new_lines(tmp_path):
    texts = [f'"king {n}"'.encode() for n in range(8)]
    invalid = [*texts[:2], b'"king', texts[3], b'"king', *texts[5:]]
    path, given = tmp_path / "answers", []
    answer_prompts(
        model, tokenizer, read(b"\n".join(invalid), folder=tmp_path), SHORT, output=path
    )
    corrected = read(b"\n".join([*texts, b'"more"']), folder=tmp_path)
    report = answer_prompts(model, tokenizer, corrected, SHORT, output=path)
    assert report.kept == 6
    answer_prompts(model, tokenizer, corrected, SHORT, on_answer=given.append)
    assert timeless(lines_of(path)) == timeless(given)
    fewer = read(b"\n".join(texts[:5]), folder=tmp_path)
    with pytest.raises(OpenELMError, match="`force`"):
        answer_prompts(model, tokenizer, fewer, SHORT, output=path)


RUN = """
import sys
from pathlib import Path
import mlx_openelm
from mlx_openelm.generation.batch_job import answer_prompts
from mlx_openelm.generation.prompt_file import read_prompts
from mlx_openelm.generation.options import Sampling
model, tokenizer = mlx_openelm.load("demo")
sampling = Sampling(max_tokens=60, stop=("the", ".", "of"))
prompts = read_prompts(sys.argv[1])
answer_prompts(model, tokenizer, prompts, sampling, output=Path(sys.argv[2]))
"""


@pytest.mark.proof
def test_a_run_that_is_killed_repeatedly_writes_the_same(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"The king {n} said to the\n" for n in range(150)))

    def start(name):
        command = [sys.executable, "-c", RUN, str(prompts), str(tmp_path / name)]
        return subprocess.Popen(command)

    assert start("whole").wait() == 0
    kills, waiting, before = 0, tmp_path / ".killed.ahead", 0
    for minimum in itertools.count(7, 11):
        process = start("killed")
        while process.poll() is None:
            files = (tmp_path / "killed", waiting)
            written = sum(p.read_bytes().count(b"\n") for p in files if p.exists())
            if written >= minimum:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        if process.wait() == 0:
            break
        kills += 1
        files = [p for p in (tmp_path / "killed", waiting) if p.exists()]
        lines = {line for p in files for line in p.read_bytes().split(b"\n")[:-1]}
        written = len(lines)  # a kill at the end leaves some lines in both files
        assert written >= before
        before = written
    assert kills >= 5
    killed, whole = (lines_of(tmp_path / name) for name in ("killed", "whole"))
    assert timeless(killed) == timeless(whole)
    assert not waiting.exists()
