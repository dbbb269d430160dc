"""Arguments that a command does not take lead to quotes or to an option."""

import pytest
from commands import call

LONG = "a" * 5000


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("generate", "Once", "upon", "a"), "needs quotes: 'Once upon a'."),
        (("generate", "Once", "-m", 4, "upon"), "needs quotes: 'Once upon'."),
        (("generate", "-p", "Once", "upon", "a"), "needs quotes: 'Once upon a'."),
        (("lora", "train.jsonl"), "give examples with --data train.jsonl."),
        (("evaluate", "book.txt"), "--text book.txt, or questions with --tasks book"),
        (("serve", "demo"), "give a model with --model demo."),
        (("chat", "Hello"), "chat reads messages from stdin; give a model with"),
        (("lora", LONG), "give examples with --data VALUE."),
        (("inspect", "demo", "x"), "Unexpected: x; quote a value that contains spaces"),
    ],
)
def test_the_error_has_the_correct_form(arguments, advice):
    ran = call(*arguments)
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert advice in " ".join(ran.stderr.replace("│", " ").split())
    assert "Usage" in ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("lora", "--data", "x", LONG),
        ("generate", "Once", LONG),
        ("generate", "--max-tokens", LONG),
        ("generate", f"--{LONG}"),
        (f"--{LONG}",),
        (LONG,),
        ("recipes", LONG),
        ("convert", "--to", LONG),
    ],
)
def test_a_long_argument_is_not_quoted_whole(arguments):
    ran = call(*arguments)
    assert ran.exit_code in (1, 2)
    assert 0 < len(ran.stderr.encode()) < 2048
