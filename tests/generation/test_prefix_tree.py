"""The radix tree of kept prompts."""

import random

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm.generation.batching.prefix_tree import (
    SHORTEST,
    PrefixLimits,
    PrefixTree,
    common_prefix,
)

LAYERS = 2
TOKEN_BYTES = 2 * LAYERS * 3 * 4 * 4  # of keys and values


def parts_of(ids, salt=0):
    """Keys and values that depend on all tokens up to their place."""
    sums = np.cumsum(ids).astype(np.float32) + salt
    grid = sums[None, None, :, None] + np.arange(3)[None, :, None, None]
    grid = grid + np.zeros((1, 1, 1, 4))
    return [mx.array((grid * (n + 1)).astype(np.float32)) for n in range(2 * LAYERS)]


def keep(tree, ids, model=""):
    tree.insert(model, np.array(ids), parts_of(ids, len(model)))


def check(tree, ids, length, model=""):
    """Check how many tokens match, and that their keys and values are theirs."""
    ids = np.array(ids)
    assert tree.match(model, ids) == length
    if length:
        expected = parts_of(ids[:length], len(model))
        for found, part in zip(tree.fetch(model, ids), expected, strict=True):
            assert mx.array_equal(found, part)


def make(count, seed=0):
    return random.Random(seed).choices(range(1000), k=count)


def test_the_longest_prefix_matches():
    tree = PrefixTree(PrefixLimits())
    ids = make(100)
    check(tree, ids, 0)
    keep(tree, ids)
    check(tree, ids, 100)
    check(tree, [*ids, 5], 100)
    check(tree, ids[:70], 70)
    check(tree, [*ids[:50], 1001], 50)
    check(tree, [1001, *ids], 0)
    assert tree.nbytes == 100 * TOKEN_BYTES


def test_short_prefixes_are_neither_kept_nor_found():
    tree = PrefixTree(PrefixLimits())
    keep(tree, make(SHORTEST - 1))
    assert tree.nbytes == 0
    ids = make(100)
    keep(tree, ids)
    check(tree, [*ids[: SHORTEST - 1], 1001], 0)
    check(tree, [*ids[:SHORTEST], 1001], SHORTEST)


def test_nodes_are_split_and_store_common_tokens_once():
    tree = PrefixTree(PrefixLimits())
    start = make(60)
    texts = [[*start, *make(40, seed=n)] for n in range(1, 4)]
    texts.append([*start[:40], *make(40, seed=9)])
    for ids in texts:
        keep(tree, ids)
    assert tree.nbytes == (60 + 3 * 40 + 40) * TOKEN_BYTES
    for ids in texts:
        check(tree, ids, len(ids))
    keep(tree, start)  # is known
    assert tree.nbytes == (60 + 3 * 40 + 40) * TOKEN_BYTES


def test_models_have_trees_of_their_own():
    tree = PrefixTree(PrefixLimits())
    ids = make(50)
    keep(tree, ids, "a")
    check(tree, ids, 0, "b")
    keep(tree, ids, "bb")
    check(tree, ids, 50, "a")
    check(tree, ids, 50, "bb")


def test_the_least_recently_used_goes_first():
    tree = PrefixTree(PrefixLimits(prompts=3))
    texts = [make(40, seed=n) for n in range(5)]
    for ids in texts[:3]:
        keep(tree, ids)
    tree.fetch("", np.array(texts[0]))  # is used again
    keep(tree, texts[1])  # also
    keep(tree, texts[3])
    check(tree, texts[2], 0)
    for ids in (texts[0], texts[1], texts[3]):
        check(tree, ids, 40)


def test_bytes_are_limited():
    tree = PrefixTree(PrefixLimits(bytes=100 * TOKEN_BYTES))
    texts = [make(40, seed=n) for n in range(5)]
    for ids in texts:
        keep(tree, ids)
        assert tree.nbytes <= 100 * TOKEN_BYTES
    check(tree, texts[3], 40)
    check(tree, texts[4], 40)
    keep(tree, make(101, seed=9))  # alone too large
    check(tree, texts[4], 40)


@pytest.mark.parametrize("limits", [PrefixLimits(prompts=0), PrefixLimits(bytes=0)])
def test_limits_of_zero_keep_nothing(limits):
    tree = PrefixTree(limits)
    keep(tree, make(50))
    assert (tree.nbytes, tree.match("", np.array(make(50)))) == (0, 0)


def test_random_prompts_match_as_a_list_of_them_would():
    chance = random.Random(0)
    tree = PrefixTree(PrefixLimits(prompts=1000))
    kept = []
    for _ in range(120):
        ids = [chance.randrange(2) for _ in range(chance.randint(1, 20))]
        ids = [one for one in ids for _ in range(16)]
        longest = max((common_prefix(np.array(ids), k) for k in kept), default=0)
        check(tree, ids, longest if longest >= SHORTEST else 0)
        keep(tree, ids)
        if len(ids) >= SHORTEST:
            kept.append(np.array(ids))
    distinct = {tuple(k[:n]) for k in kept for n in range(1, len(k) + 1)}
    assert tree.nbytes == len(distinct) * TOKEN_BYTES


def test_memory_of_what_goes_is_freed():
    tree = PrefixTree(PrefixLimits(prompts=2))
    start = make(40)
    before = mx.get_active_memory()
    for n in range(30):
        keep(tree, [*start, *make(400, seed=n)])
    used = mx.get_active_memory() - before
    assert tree.nbytes <= used <= 1.5 * tree.nbytes  # of 15 times, if all were kept
