import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import small_tokenizer

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.stopping import Answer, LoopFinder, StopTexts

tokenizer = small_tokenizer()
WORDS = tokenizer.encode("a king and a queen", bos=False)[:8]


def byte_tokens(data):
    return [tokenizer.processor.PieceToId(f"<0x{byte:02X}>") for byte in data]


def add_all(tokens, *, budget=500, after=(1,), **options):
    """Add tokens until the answer ends; return it, its text and the number added."""
    answer = Answer(tokenizer, after, Sampling(**options), budget)
    text = ""
    for count, token in enumerate(tokens, start=1):
        text += answer.add(token)
        if answer.finish_reason:
            return answer, text, count
    return answer, text, len(tokens)


@pytest.mark.parametrize("position", range(8))
def test_eos_ends_the_answer_at_any_position(position):
    tokens = [*WORDS[:position], tokenizer.eos_id, *WORDS]
    answer, text, count = add_all(tokens)
    assert (answer.finish_reason, count) == ("stop", position + 1)
    assert answer.tokens == WORDS[:position]
    assert text == tokenizer.decode(WORDS[:position])


@pytest.mark.parametrize("budget", range(1, 8))
def test_the_budget_ends_it_with_length(budget):
    answer, text, count = add_all(WORDS, budget=budget)
    assert (answer.finish_reason, count) == ("length", budget)
    assert text == tokenizer.decode(WORDS[:budget])


def test_eos_as_the_last_token_of_the_budget_is_a_stop():
    answer, _, _ = add_all([*WORDS[:3], tokenizer.eos_id], budget=4)
    assert answer.finish_reason == "stop"


def test_the_first_words_space_is_kept_after_a_prompt():
    king = tokenizer.encode("king", bos=False)
    assert add_all(king, after=[1])[1] == "king"
    assert add_all(king, after=[1, *WORDS])[1] == " king"


def test_tokens_after_the_end_are_ignored():
    answer, _, _ = add_all(WORDS, budget=3)
    assert answer.add(WORDS[3]) == ""
    assert (answer.tokens, answer.finish_reason) == (WORDS[:3], "length")


texts = st.text(st.sampled_from("ab \n日\U0001f600é"), min_size=1, max_size=20)
stop_texts = st.lists(st.text("ab \n日", min_size=1, max_size=4), max_size=3)


@settings(max_examples=150)
@given(texts, stop_texts)
def test_it_ends_before_the_first_stop_text(text, stops):
    tokens = [*tokenizer.encode(text, bos=False), tokenizer.eos_id]
    answer, result, count = add_all(tokens, stop=tuple(stops))
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    assert result == (text[: min(ends)[1]] if ends else text)
    assert answer.finish_reason == "stop"
    if ends:  # at the very token that completes it
        assert all(s not in tokenizer.decode(tokens[: count - 1]) for s in stops)


@given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
def test_without_a_stop_text_the_text_is_complete(tokens):
    tokens = [token for token in tokens if token != tokenizer.eos_id]
    _, text, _ = add_all([*tokens, tokenizer.eos_id])
    assert text == tokenizer.decode(tokens)


@pytest.mark.parametrize("ending", ["eos", "budget", "loop"])
def test_half_a_character_at_the_end_is_kept(ending):
    tokens = byte_tokens("日".encode()[:2])
    options = {"budget": 2} if ending == "budget" else {}
    if ending == "eos":
        tokens.append(tokenizer.eos_id)
    if ending == "loop":
        tokens, options = byte_tokens(b"\xe6" * 16), {"stop_loops": 2}
    answer, text, count = add_all(tokens, **options)
    assert count == len(tokens)
    assert text == tokenizer.decode(answer.tokens)
    assert set(text) == {"\ufffd"}


@pytest.mark.parametrize("options", [{"budget": 5}, {"stop_loops": 2}])
def test_the_start_of_a_stop_text_is_released_at_the_end(options):
    tokens = (
        byte_tokens(b"abcde") if "budget" in options else byte_tokens(b"abcdefgh" * 2)
    )
    stop = "de!" if "budget" in options else "efgh!"
    answer, text, _ = add_all(tokens, stop=(stop,), **options)
    assert answer.finish_reason == ("length" if "budget" in options else "loop")
    assert text == tokenizer.decode(tokens)


def test_a_stop_text_in_the_last_released_text_counts():
    answer, text, _ = add_all([*byte_tokens(b"ab\xe6")], budget=3, stop=("\ufffd",))
    assert (answer.finish_reason, text) == ("stop", "ab")


def test_a_stop_text_wins_over_a_loop_that_ends_with_it():
    stop = "b" + "ab" * 7
    answer, text, _ = add_all(byte_tokens(b"ab" * 8), stop_loops=2, stop=(stop,))
    assert (answer.finish_reason, text) == ("stop", "a")


def test_a_loop_ends_the_answer_and_is_part_of_it():
    tokens = [*WORDS[:2], *WORDS * 5]
    answer, text, count = add_all(tokens, stop_loops=3)
    assert (answer.finish_reason, count) == ("loop", 2 + 3 * len(WORDS))
    assert text == tokenizer.decode(tokens[:count])
    assert add_all(tokens)[0].finish_reason is None
    prompt = [1, *WORDS * 2]  # is not searched for loops
    assert add_all(WORDS * 2, stop_loops=3, after=prompt)[0].finish_reason is None


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3)))
def test_stop_texts_do_not_depend_on_token_boundaries(text, stops):
    whole, single = StopTexts(stops), StopTexts(stops)
    at_once = whole.add(text) + whole.finish()
    one_by_one = "".join(single.add(c) for c in text) + single.finish()
    assert at_once == one_by_one
    assert whole.matched == single.matched == any(s in text for s in stops)


# Loops ---------------------------------------------------------------------------


def is_loop(tokens, times):
    """Return whether the tokens end in a loop, by its definition."""
    return any(
        len(tokens) >= copies * period >= 16
        and tokens[-copies * period :] == tokens[-period:] * copies
        for period in range(1, 65)
        for copies in range(times, max(times, 16) + 1)
    )


blocks = st.tuples(
    st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 12)
)


@given(st.lists(blocks, max_size=4), st.integers(2, 6))
def test_a_loop_is_detected_exactly_by_its_definition(parts, times):
    tokens = [token for block, count in parts for token in block * count]
    finder = LoopFinder(times)
    for end, token in enumerate(tokens, start=1):
        assert finder.add(token) == is_loop(tokens[:end], times)


@pytest.mark.parametrize(
    ("period", "times", "needed"),
    [(1, 2, 16), (3, 2, 18), (8, 2, 16), (64, 2, 128), (64, 3, 192), (1, 20, 20)],
)
def test_the_shortest_loop_has_the_documented_length(period, times, needed):
    finder = LoopFinder(times)
    results = [finder.add(i % period) for i in range(needed)]
    assert results == [False] * (needed - 1) + [True]


def test_a_block_of_more_than_64_tokens_is_not_a_loop():
    finder = LoopFinder(2)
    assert not any(finder.add(i % 65) for i in range(65 * 6))
