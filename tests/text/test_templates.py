"""Prompt templates: the exact strings of OpenELM's training and their ids."""

import pytest
from models import small_tokenizer

from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.templates import Turn, encode_prompt, encode_turns, render
from mlx_openelm.text.tokenizer import Tokenizer

tokenizer = small_tokenizer()

INDENT = " " * 16
ALPACA = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request."
)


def decoded_prompt(name, prompt, system=""):
    ids = encode_prompt(tokenizer, prompt, template=name, system=system)
    assert ids[0] == 1
    assert ids.count(1) == 1
    return ids


def test_the_peft_template_equals_apples_byte_for_byte():
    ids = decoded_prompt("openelm-peft", "Do it.")
    assert tokenizer.decode(ids) == (
        f"{ALPACA}  \n\n{INDENT}### Instruction:\n{INDENT}Do it.\n{INDENT}\n"
        f"{INDENT}### Response:\n{INDENT}"
    )


def test_the_instruct_template_has_real_eos_tokens_and_an_empty_system_turn():
    ids = decoded_prompt("instruct", "Hi")
    assert ids.count(2) == 2
    segments = [
        "<|system|>\n",
        "\n<|user|>\nHi",
        "\n<|assistant|>\n",
    ]
    expected = [1]
    for i, segment in enumerate(segments):
        expected += ([2] if i else []) + tokenizer.encode(segment, bos=False)
    assert ids == expected
    assert "Be brief" in tokenizer.decode(decoded_prompt("instruct", "Hi", "Be brief"))


def test_auto_is_the_stored_template_else_raw():
    assert encode_prompt(tokenizer, "Hi") == tokenizer.encode("Hi")
    stored = Tokenizer(tokenizer.model_proto, template="alpaca")
    assert encode_prompt(stored, "Hi") == encode_prompt(
        tokenizer, "Hi", template="alpaca"
    )


def test_wrong_templates_are_refused():
    with pytest.raises(OpenELMError, match="instruct"):
        encode_prompt(tokenizer, "Hi", template="zephyr")
    with pytest.raises(OpenELMError, match="`system`"):
        encode_prompt(tokenizer, "Hi", template="raw", system="x")


def test_an_instruct_prompt_is_zephyrs_with_one_bos_and_an_eos_after_each_turn():
    plain = tokenizer.processor.encode
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    turns = (Turn("user", "Hi"), Turn("assistant", "Yes?"), Turn("user", "Who?"))
    ids, left_space = encode_turns(tokenizer, turns, "instruct", "Be kind.")
    assert not left_space
    assert ids == [
        bos,
        *plain("<|system|>\nBe kind."),
        eos,
        *plain("\n<|user|>\nHi"),
        eos,
        *plain("\n<|assistant|>\nYes?"),
        eos,
        *plain("\n<|user|>\nWho?"),
        eos,
        *plain("\n<|assistant|>\n"),
    ]


def test_several_system_messages_are_rendered_in_their_places():
    first, second = Turn("system", "Be kind."), Turn("system", "Be brief.")
    turns = [first, second, Turn("user", "Hi"), first, Turn("assistant", "Ho")]
    (instruct,) = render(turns, "instruct")
    places = [instruct.context.index(t) for t in ("Be kind", "Be brief", "Hi</s>")]
    assert places == sorted(places)
    assert instruct.context.count("<|system|>") == 3
    (alpaca,) = render(turns, "alpaca")
    assert alpaca.context.startswith("Be kind.\n\nBe brief.\n\n### Instruction:\nHi")
    assert alpaca.context.count("Be kind.") == 2


def test_an_answer_may_come_first():
    turns = [Turn("assistant", "Hello."), Turn("user", "Hi"), Turn("assistant", "Ho")]
    greeting, answer = render(turns, "instruct")
    assert (greeting.answer, answer.answer) == ("Hello.", "Ho")
