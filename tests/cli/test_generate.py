"""Options of generate that leave the answer unchanged, and wrong options."""

import json
import re

import pytest
from commands import call, expect_error

MODEL = ("--model", "model", "--quiet")
PROMPT = "the king said the king said"


def answer(*args, **options):
    """Return the stdout of a command, which must succeed."""
    result = call(*args, **options)
    assert result.exit_code == 0, result.output
    return result.stdout


def generate(*args):
    return json.loads(answer("generate", PROMPT, *MODEL, "-m", 24, "--json", *args))


@pytest.mark.parametrize(
    "options",
    [
        ("--lookup", 4),
        ("--draft-model", "model"),
        ("--prompt-cache", "kept"),
        ("--max-kv-size", 60),
    ],
)
def test_the_answer_is_that_of_plain_decoding(here, options):
    plain = generate()
    for _ in range(2):  # the second time from the prompt cache
        assert generate(*options)["tokens"] == plain["tokens"]


def test_a_cached_prompt_is_reused_and_an_outdated_one_is_reported(here):
    first = generate("--prompt-cache", "kept")
    again = generate("--prompt-cache", "kept")
    assert first["cached_tokens"] == 0
    assert again["cached_tokens"] == again["prompt_tokens"] - 1
    args = ("generate", PROMPT, "--model", "model", "--prompt-cache", "kept")
    outdated = call(*args, "-m", 2, "--template", "alpaca")
    assert "kept is of another template" in outdated.stderr.replace("\n", " ") or (
        "template" in outdated.stderr
    )


def test_draft_tokens_are_counted_on_stderr(here):
    result = call("generate", PROMPT, *MODEL[:2], "-m", 40, "--lookup", 4)
    assert re.search(r"\[\d+ of \d+ draft tokens? accepted\]", result.stderr)


def test_a_file_of_prompts_is_answered_as_one_by_one(here):
    prompts = ["the king", "a queen who", "once upon a time there"]
    (here / "prompts.txt").write_text("\n".join(prompts))
    args = ("generate", "--prompts-file", "prompts.txt", *MODEL, "-m", 9)
    lines = [json.loads(line) for line in answer(*args).splitlines()]
    single = [
        json.loads(answer("generate", prompt, *MODEL, "-m", 9, "--json"))
        for prompt in prompts
    ]
    assert [line["tokens"] for line in lines] == [one["tokens"] for one in single]
    assert [line["text"] for line in lines] == [one["text"] for one in single]


def test_a_bad_line_is_reported_and_the_others_are_answered(here):
    (here / "prompts.jsonl").write_text('{"prompt": "a king"}\n{"promt": 1}\n"Hi"\n')
    result = call("generate", "--prompts-file", "prompts.jsonl", *MODEL[:2], "-m", 4)
    assert result.exit_code == 1
    assert "prompts.jsonl:2:" in result.stderr
    assert "1 of 3 prompts of prompts.jsonl have no answer" in result.stderr
    assert len(result.stdout.splitlines()) == 3


def test_logprobs_come_with_json(here):
    result = generate("--logprobs", 2)
    for entry, token in zip(result["logprobs"], result["tokens"], strict=True):
        assert entry["token"] == token
        assert entry["logprob"] == pytest.approx(entry["top"][0]["logprob"])  # greedy
        assert entry["top"][0]["token"] == token
        assert len(entry["top"]) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--lookup", 0), "--lookup is 0"),
        (("--kv-bits", 3), "--kv-bits is 3; it must be 4 or 8"),
        (("--max-kv-size", 2), "--max-kv-size is 2; it must be 5 or more"),
        (("--logit-bias", "five=1"), "it must be ID=BIAS"),
        (("--logit-bias", "100000=1"), "--logit-bias names the token 100000"),
        (("--stop-loops", 1), "--stop-loops is 1"),
        (("--draft-model", "demo"), "vocabulary has 4096 rows"),
        (("--prompt-cache", "model/config.json"), "config.json"),
        (("--max-kv-size", 40, "--prompt-cache", "x"), "leave out one of them"),
    ],
)
def test_wrong_values_are_refused_in_one_line(here, args, message):
    expect_error(here, "generate", PROMPT, *MODEL, "-m", 4, *args, message=message)


@pytest.mark.parametrize(
    "args",
    [
        ("Hi", "--prompts-file", "x"),
        ("--prompts-file", "x", "--lookup", "3"),
        ("--prompts-file", "x", "--draft-model", "demo"),
        ("Hi", "--output", "x"),
        ("Hi", "--batch-size", "4"),
        ("Hi", "--force"),
        ("Hi", "--logprobs", "3"),
        ("Hi", "--lookup", "3", "--draft-model", "demo"),
    ],
)
def test_contradicting_options_are_wrong_usage(here, args):
    result = call("generate", *args, *MODEL)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize("foreign", ["my notes", '{"a": 1}', "one prompt\nanother"])
def test_a_foreign_file_is_not_overwritten(here, foreign):
    (here / "prompts.txt").write_text("the king\n")
    (here / "notes").write_text(foreign)
    args = ("generate", "--prompts-file", "prompts.txt", *MODEL, "-m", 4)
    expect_error(
        here, *args, "--output", "notes", message="notes:1 is not an answer to a prompt"
    )


def test_the_prompts_file_is_not_overwritten(here):
    (here / "prompts").write_text("one prompt")
    args = ("generate", "--prompts-file", "prompts", *MODEL, "-m", 4)
    expect_error(here, *args, "--output", "prompts", message="is the file of prompts")


def test_very_large_numbers_work_or_are_refused(here):
    huge = ("--min-tokens", 10**24, "--repetition-context", 10**24)
    assert generate(*huge, "--repetition-penalty", 1.2)["generation_tokens"] == 24
    expect_error(here, "generate", PROMPT, *MODEL, "--temp", 1e39, message="--temp is")
