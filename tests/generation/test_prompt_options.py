"""Options in the records of a prompts file: honoured, or refused by name."""

import json

import pytest
from models import UNEVEN, build, small_tokenizer

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.batch_job import answer_prompts
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.prompt_file import read_prompts
from mlx_openelm.generation.streaming import generate

tokenizer = small_tokenizer()
model = build(UNEVEN)
SHORT = Sampling(max_tokens=6, logit_bias=((tokenizer.eos_id, -100.0),))


def write(folder, *records):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_prompts(path)


def answer(prompts, **options):
    given = []
    report = answer_prompts(
        model, tokenizer, prompts, SHORT, on_answer=given.append, **options
    )
    return given, report


def test_options_of_a_record_apply_to_its_answer_alone(tmp_path):
    first = generate(model, tokenizer, "a king", Sampling(max_tokens=1))
    records = [
        {"prompt": "a king"},
        {"prompt": "a king", "max_tokens": 2},
        {"prompt": "a king", "stop": first},
        {"prompt": "a king", "stop": ["nothing", first], "max_new_tokens": 4},
        {"prompt": "a king", "temperature": 5, "seed": 3, "top_p": None},
        {"prompt": "a king", "logit_bias": {"7": 100}},
        {"prompt": "a king", "logprobs": 2, "max_completion_tokens": 3},
        {"prompt": "a king"},
    ]
    given, report = answer(write(tmp_path, *records), batch_size=3)
    assert not report.problems
    assert [line["line"] for line in given] == [*range(1, len(records) + 1)]
    whole, short, stopped, either, drawn, forced, likely, last = given
    assert whole["text"] == last["text"] == generate(model, tokenizer, "a king", SHORT)
    assert (len(whole["tokens"]), whole["finish_reason"]) == (6, "length")
    assert short["tokens"] == whole["tokens"][:2]
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")
    assert (either["text"], either["finish_reason"]) == ("", "stop")
    assert drawn["tokens"] != whole["tokens"]
    assert forced["tokens"] == [7] * 6
    assert likely["tokens"] == whole["tokens"][:3]
    assert [len(token["top"]) for token in likely["logprobs"]] == [2] * 3
    assert "logprobs" not in whole


BAD = {
    "max_tokens": (0, "`max_tokens` is 0"),
    "temperature": ("hot", "`temp` is 'hot'"),
    "stop": ([""], "`stop` is empty"),
    "stop_loops": (1, "`stop_loops` is 1"),
    "logit_bias": ({"x": 1}, "`logit_bias` is"),
    "system": ("Be kind.", "The record has 'system', which is not used"),
    "maxtokens": (3, "The record has 'maxtokens'"),
}


@pytest.mark.parametrize("key", BAD)
def test_a_wrong_or_unknown_option_is_refused_by_name(tmp_path, key):
    value, words = BAD[key]
    given, report = answer(write(tmp_path, {"prompt": "a", key: value}, "a king"))
    assert words in given[0]["error"]
    assert "text" in given[1]
    assert len(report.problems) == 1


def test_an_option_given_twice_and_an_unknown_token_are_refused(tmp_path):
    twice = {"prompt": "a", "max_tokens": 1, "max_new_tokens": 2}
    unknown = {"prompt": "a", "logit_bias": {"300": 1}}
    given, _ = answer(write(tmp_path, twice, unknown))
    assert "gives max_tokens twice" in given[0]["error"]
    assert "`logit_bias` names the token 300" in given[1]["error"]


def test_a_run_resumes_only_with_the_same_options(tmp_path):
    output = tmp_path / "answers.jsonl"
    records = [{"prompt": "a king", "max_tokens": 2}, {"prompt": "a wolf"}]
    _, first = answer(write(tmp_path, *records), output=output)
    written = output.read_bytes()
    _, again = answer(write(tmp_path, *records), output=output)
    assert (first.kept, again.kept) == (0, 2)
    assert output.read_bytes() == written
    records[0]["max_tokens"] = 3
    with pytest.raises(OpenELMError, match="other settings"):
        answer(write(tmp_path, *records), output=output)
