"""Empty prompts and missing files end in one error before a model is loaded."""

import pytest
from commands import call, expect_error


@pytest.mark.parametrize(
    ("arguments", "piped"),
    [
        (("",), None),
        (("-p", ""), None),
        ((), ""),
        ((), "\n\n"),
        (("-",), ""),
    ],
)
def test_an_empty_prompt_is_an_error(here, arguments, piped):
    message = expect_error(
        *(here, "generate", "--model", "model", *arguments),
        message=["The prompt is empty", "generate 'Once upon a time'", "bos_id"],
        input=piped,
    )
    assert message.count("\n") == 1


def test_the_call_that_the_error_names_generates_from_bos_alone(here):
    from mlx_openelm import Sampling, load, stream

    model, tokenizer = load("model")
    pieces = stream(model, tokenizer, [tokenizer.bos_id], Sampling(max_tokens=2))
    assert [piece.prompt_tokens for piece in pieces] == [1, 1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--prompts-file", "nowhere.txt"),
        ("evaluate", "--text", "nowhere.txt"),
        ("evaluate", "--tasks", "nowhere.json"),
        ("convert", "demo", "-q", "--calibration", "nowhere.txt"),
    ],
)
@pytest.mark.parametrize("place", ["nowhere", "model"])
def test_a_missing_file_is_one_plain_error(here, arguments, place):
    """A folder in place of a file is one too."""
    if place == "model":
        (here / arguments[-1]).mkdir()
    message = expect_error(
        *(here, *arguments),
        message="is a directory" if place == "model" else "no such file or directory",
    )
    assert message.count("nowhere") == 1
    assert "Errno" not in message


def test_a_note_on_the_machine_is_written_once(here):
    (here / "text.txt").write_text("Once upon a time there was a king.")
    arguments = ("--model", "model", "--compare", "source", "--compare", "demo")
    ran = call("evaluate", "--text", "text.txt", *arguments)
    assert ran.exit_code == 0, ran.stderr
    assert ran.stderr.count("float32") <= 1
