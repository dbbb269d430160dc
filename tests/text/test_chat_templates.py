"""Jinja's chat templates give the ids of our own rendering."""

import random

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.hub import demo_folder
from mlx_openelm.storage.tokenizer_finder import read_tokenizer
from mlx_openelm.text.chat_templates import chat_template, recognize
from mlx_openelm.text.templates import TEMPLATE_NAMES, Turn, encode_turns, render

pytestmark = pytest.mark.interop

TOKENIZER = read_tokenizer(demo_folder())
THEIRS = HuggingFaceTokenizer.from_file(str(demo_folder() / "tokenizer.json"))
NAMES = [name for name in TEMPLATE_NAMES if name not in ("auto", "raw")]
PARTS = (
    *("Once upon a time", "who?", "1234", "'\"\\n\\", "<|user|>\n", "</s>", "</s>"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", ""),
    *("é", "日本語", "👩‍👩‍👧", "مرحبا", "e\u0301", "\u200b"),
    *("def f(x):\n    return x  # {{ x }}\n", "{% if x %}{# no #}", "### Response:\n"),
)


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices(PARTS, k=rng.choice((0, 1, 1, 2, 4))))


def random_conversation(rng: random.Random) -> list[Turn]:
    """Up to two system texts and 1 to 6 turns, now and then in an unusual order."""
    turns = [Turn("system", random_text(rng)) for _ in range(rng.choice((0, 0, 1, 2)))]
    for i in range(rng.randint(1, 6)):
        usual = ("user", "assistant")[i % 2]
        role = rng.choice(("system", "user", "assistant", usual, usual, usual, usual))
        turns.append(Turn(role, random_text(rng)))
    return turns


def their_ids(turns: list[Turn], name: str, *, for_answer: bool) -> list[int]:
    """As transformers, mlx-lm and Swift do: no special tokens are added to the text."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    (text,), _ = render_jinja_template(
        [messages],
        chat_template=chat_template(name),
        add_generation_prompt=for_answer,
        bos_token="<s>",
        eos_token="</s>",
    )
    return THEIRS.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_ours_for_generated_conversations(name: str) -> None:
    rng = random.Random(name)
    for _ in range(1200):
        turns = random_conversation(rng)
        ids, _ = encode_turns(TOKENIZER, turns, name)
        assert their_ids(turns, name, for_answer=True) == ids, turns
        if turns[-1].role == "assistant":  # as in training
            exchanges = render(turns, name)
            text = "".join(f"{e.context}{e.answer}</s>" for e in exchanges)
            ids = TOKENIZER.encode_rendered(text)
            assert their_ids(turns, name, for_answer=False) == ids, turns


@pytest.mark.parametrize("name", NAMES)
def test_the_developer_is_the_system_and_other_roles_are_refused(name: str) -> None:
    turns = [Turn("system", "Be brief."), Turn("user", "Hi")]
    expected = their_ids(turns, name, for_answer=True)
    turns[0] = Turn("developer", "Be brief.")
    assert their_ids(turns, name, for_answer=True) == expected
    with pytest.raises(Exception, match="The role tool is not system"):
        their_ids([*turns, Turn("tool", "4")], name, for_answer=True)


def test_no_messages_give_the_start_of_an_answer() -> None:
    ids, _ = encode_turns(TOKENIZER, [], "instruct")
    assert their_ids([], "instruct", for_answer=True) == ids


def test_a_template_is_recognized_by_its_exact_text() -> None:
    texts = {name: chat_template(name) or "" for name in NAMES}
    assert {name: recognize(f"{text}\n") for name, text in texts.items()} == {
        name: name for name in NAMES
    }
    assert recognize(texts["instruct"].replace("system", "System")) is None
    assert recognize("") is None


def test_raw_has_none_and_an_unknown_name_is_an_error() -> None:
    assert chat_template(None) is chat_template("raw") is None
    with pytest.raises(OpenELMError, match="'poem' has no chat template"):
        chat_template("poem")
