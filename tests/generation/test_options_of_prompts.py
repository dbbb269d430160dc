"""Options of single prompts in a file, beside those of the command line."""

import json

from commands import call


def test_a_temperature_of_zero_takes_no_penalty_from_the_model(tmp_path):
    prompt = {"prompt": "Once upon a time"}
    lines = [{**prompt, "temperature": 0}, {**prompt, "temp": 0, "max_tokens": 6}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    result = call("generate", "--prompts-file", file, "-m", "12", "--json")
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    alone = call("generate", prompt["prompt"], "--temp", "0", "-m", "12", "--no-stream")
    assert first["text"] == alone.stdout.removesuffix("\n")
    assert (len(second["tokens"]), first["text"].startswith(second["text"])) == (
        6,
        True,
    )
