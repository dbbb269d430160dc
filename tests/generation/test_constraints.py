"""Grammars: what they refuse, and the limits of their parser."""

import numpy as np
import pytest
from models import small_tokenizer

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation import constraints
from mlx_openelm.generation.constraints import GrammarCompiler

VOCABULARY = 300


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(small_tokenizer(), VOCABULARY)


def follow(constraint, chance, count):
    """Advance by random tokens that are allowed."""
    for _ in range(count):
        allowed = np.flatnonzero(constraint.allowed(VOCABULARY))
        constraint.accept(int(chance.choice(allowed)))


def test_answers_do_not_use_up_the_limits_of_later_ones(compiler, monkeypatch):
    monkeypatch.setattr(constraints, "_MOST_LEXER_STATES", 120)
    constraint = compiler.regex("([a-z ]{1,40}e){1,30}")

    def follow_often(start):
        chance = np.random.default_rng(0)
        for _ in range(60):
            follow(start(), chance, 12)

    follow_often(constraint.restarted)
    with pytest.raises(OpenELMError, match="too many states"):
        follow_often(constraint.copy)
    follow_often(constraint.restarted)


def test_a_restarted_constraint_is_at_the_start(compiler):
    constraint = compiler.regex("abc")
    first = constraint.allowed(VOCABULARY)
    follow(constraint, np.random.default_rng(0), 1)
    assert not np.array_equal(constraint.allowed(VOCABULARY), first)
    assert np.array_equal(constraint.restarted().allowed(VOCABULARY), first)


@pytest.mark.parametrize("grammar", ["start: start", 'start: "a" "b" start'])
def test_a_grammar_without_texts_is_refused(compiler, grammar):
    with pytest.raises(OpenELMError, match=r"no text matches it|Too many items"):
        compiler.grammar(grammar)


@pytest.mark.parametrize("options", [5, None, [], "x", {"item_separator": 5}, {"x": 1}])
def test_a_layout_that_is_none_is_refused(compiler, options):
    with pytest.raises(OpenELMError, match="JSON schema"):
        compiler.json_schema({"type": "object", "x-guidance": options})
