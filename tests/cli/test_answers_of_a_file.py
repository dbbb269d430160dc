"""The answers to a file of prompts: as JSON lines, and as text on a terminal."""

import json
import os
import pty
import subprocess
import sys

import pytest
from commands import call
from places import ROOT

from mlx_openelm.message_parts import count_of

RECORDS = (
    {"prompt": "a king"},
    {"messages": [{"role": "user", "content": "a queen"}], "id": "q"},
)
ARGUMENTS = ("generate", "--prompts-file", "prompts.jsonl", "--model", "model", "-m", 4)


@pytest.fixture
def prompts(here):
    text = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (here / "prompts.jsonl").write_text(text)
    return here


def test_a_line_has_its_prompt_and_rounded_rates(prompts):
    lines = [json.loads(line) for line in call(*ARGUMENTS).stdout.splitlines()]
    for line, record in zip(lines, RECORDS, strict=True):
        assert record.items() <= line.items()
        for name, digits in (("generation_tps", 2), ("time_to_first_token_s", 4)):
            assert line[name] == round(line[name], digits) > 0
    one = json.loads(call("generate", "a king", *ARGUMENTS[3:], "--json").stdout)
    assert one["generation_tps"] == round(one["generation_tps"], 2) > 0


def test_an_output_without_prompts_is_resumed(prompts):
    """An earlier version wrote none."""
    assert call(*ARGUMENTS, "--output", "out.jsonl").exit_code == 0
    written = (prompts / "out.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    del lines[0]["prompt"]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (prompts / "out.jsonl").write_text(text)
    ran = call(*ARGUMENTS, "--output", "out.jsonl")
    assert (
        "2 of 2 prompts answered, 2 of them in an earlier run; 0 tokens" in ran.stderr
    )
    assert (prompts / "out.jsonl").read_text() == text


def test_a_terminal_gets_prompts_and_answers_as_text(prompts):
    answers = [
        json.loads(line)["text"] for line in call(*ARGUMENTS).stdout.splitlines()
    ]
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "mlx_openelm", *map(str, ARGUMENTS), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, stdout=terminal, check=True, env=environment, timeout=100)
    os.close(terminal)
    shown = os.read(master, 10_000).decode().replace("\r\n", "\n")
    os.close(master)
    assert shown == f"1: a king\n{answers[0]}\n\n2: a queen\n{answers[1]}\n\n"


def test_a_count_of_one_is_singular(prompts):
    (prompts / "prompts.jsonl").write_text('"a king"\n')
    ran = call(*ARGUMENTS[:-1], 1)
    assert "[prompts.jsonl: 1 prompt, JSON lines]" in ran.stderr
    assert "[1 of 1 prompt answered; 1 token generated]" in ran.stderr
    assert count_of(0, "row") == "0 rows"
    assert count_of(2000, "row") == "2,000 rows"
