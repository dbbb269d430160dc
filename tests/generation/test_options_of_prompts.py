"""Options of single prompts in a file, beside those of the command line."""

import json

import pytest
from commands import call

from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.prompt_file import read_prompts


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


@pytest.mark.parametrize(
    "option",
    [
        *({"stop": value} for value in (5, True, {"x": 1}, "", ["a", ""], [["a"]])),
        *({"stop": value} for value in ("\ud800", ["a", "\ud800"])),
        *({"logit_bias": value} for value in (7, "x", [5], [[5]], {"9" * 5000: 1})),
    ],
)
def test_a_value_of_another_type_is_a_problem_of_its_prompt(tmp_path, option):
    prompt, _ = _read(tmp_path, {"prompt": "A", **option}, {"prompt": "B"})
    assert next(iter(option)) in prompt.problem


def test_pairs_of_token_and_bias_can_be_a_list(tmp_path):
    lists = {"logit_bias": [[5, 1], [6, -2.5]], "stop": ["a", "b"]}
    (prompt,) = _read(tmp_path, {"prompt": "A", **lists})
    read = {"logit_bias": ((5, 1), (6, -2.5)), "stop": ("a", "b")}
    assert prompt.options == read
    sampling = Sampling(**lists)
    assert hash(sampling) == hash(Sampling(**read))
    assert Sampling(stop="END").stop == ("END",)


def _read(folder, *records):
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return read_prompts(path).prompts
