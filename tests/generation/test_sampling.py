import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.sampling import (
    choose_tokens,
    distribution,
    keep_likely,
    shape_logits,
    top_logprobs,
)

logit_lists = st.lists(
    st.floats(-8, 8, width=32, allow_subnormal=False),
    min_size=3,
    max_size=12,
    unique=True,
)


def kept(logits, **options):
    filtered = keep_likely(mx.array(logits)[None], Sampling(temp=1.0, **options))
    return {i for i, x in enumerate(np.array(filtered)[0]) if x > -np.inf}


def softmax(logits):
    exp = np.exp(np.array(logits, np.float64) - max(logits))
    return exp / exp.sum()


@given(logit_lists, st.floats(0.05, 0.99))
def test_top_p_keeps_the_smallest_set_of_that_mass(logits, top_p):
    probs = softmax(logits)
    # Ordered by logits: close ones may have equal probabilities after rounding.
    order = np.argsort(-np.array(logits, np.float32), kind="stable")
    mass = np.cumsum(probs[order])
    if np.abs(mass - top_p).min() < 1e-5:
        return  # a border below float32's precision
    count = int(np.searchsorted(mass, top_p)) + 1
    assert kept(logits, top_p=top_p) == set(order[:count].tolist())


@given(logit_lists, st.integers(1, 12))
def test_top_k_keeps_the_k_likeliest(logits, top_k):
    order = np.argsort(-np.array(logits, np.float32), kind="stable")
    assert kept(logits, top_k=top_k) == set(order[:top_k].tolist())


@given(logit_lists, st.floats(0.01, 0.9))
def test_min_p_is_relative_to_the_likeliest_token(logits, min_p):
    probs = softmax(logits)
    share = probs / probs.max()
    if np.abs(share - min_p).min() < 1e-5:
        return
    assert kept(logits, min_p=min_p) == set(np.flatnonzero(share >= min_p).tolist())


def test_filters_that_are_off_keep_everything():
    assert kept([3.0, -50.0, 0.0]) == {0, 1, 2}
    assert kept([3.0, -50.0, 0.0], top_p=1.0, top_k=0, min_p=0.0) == {0, 1, 2}


@pytest.mark.parametrize(
    "options",
    [{}, {"top_p": 0.8}, {"top_k": 3}, {"min_p": 0.3}, {"top_p": 0.9, "top_k": 3}],
)
def test_draws_follow_the_distribution(options):
    mx.random.seed(0)
    logits = mx.array([[1.0, 0.0, -1.0, 0.5, -2.0], [-3.0, 2.0, 0.0, 1.0, 1.5]])
    sampling = Sampling(temp=0.7, **options)
    probs = np.exp(np.array(distribution(logits, sampling)))
    count = 4000
    draws = choose_tokens(mx.repeat(logits, count, axis=0), sampling)
    assert (draws.shape, draws.dtype) == ((2 * count,), mx.int32)
    for row, drawn in enumerate(np.array(draws).reshape(2, count)):
        likely = sorted(kept(logits[row].tolist(), **options))
        expected = np.zeros(5)
        expected[likely] = softmax(np.array(logits)[row, likely] / 0.7)
        np.testing.assert_allclose(probs[row], expected, rtol=1e-5)
        counts = np.bincount(drawn, minlength=5)
        assert not counts[expected == 0].any()
        parts = (counts - count * expected)[likely] ** 2 / (count * expected[likely])
        assert parts.sum() < 25  # chi-square, at most 4 degrees of freedom: p < 1e-4


def test_temperature_zero_is_the_argmax():
    logits = mx.array([[0.1, 0.3, 0.2], [0.5, 0.5, 0.0]])
    tokens = choose_tokens(logits, Sampling())
    assert (tokens.tolist(), tokens.dtype) == ([1, 0], mx.int32)
    certain = np.exp(np.array(distribution(logits, Sampling())))
    np.testing.assert_array_equal(certain, [[0, 1, 0], [1, 0, 0]])


filters = st.fixed_dictionaries(
    {},
    optional={
        "top_p": st.floats(0.05, 0.99),
        "top_k": st.integers(1, 14),
        "min_p": st.floats(0.01, 0.9),
    },
)


@given(st.integers(0, 999), filters)
def test_combined_filters_keep_the_intersection(seed, options):
    logits = np.random.default_rng(seed).normal(0, 2, 12).astype(np.float32)
    each = [kept(logits, **{name: value}) for name, value in options.items()]
    assert kept(logits, **options) == set(range(12)).intersection(*each)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 40}])
def test_half_precision_is_filtered_and_drawn_in_float32(dtype, options):
    mx.random.seed(3)
    logits = mx.random.normal((2, 32000)).astype(dtype)
    sampling = Sampling(temp=1.0, **options)
    for function in (keep_likely, distribution):
        actual = function(logits, sampling)
        expected = function(logits.astype(mx.float32), sampling)
        assert actual.dtype == mx.float32
        assert mx.array_equal(actual, expected)
    if "top_p" in options:
        mass = mx.softmax(logits.astype(mx.float32), axis=-1)
        mass = mx.where(keep_likely(logits, sampling) > -mx.inf, mass, 0).sum(axis=-1)
        np.testing.assert_allclose(np.array(mass), 0.9, atol=5e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"temp": 1e-300},
        {"temp": 1.0, "top_p": 1e-300},
        {"temp": 1.0, "min_p": 1.0},
        {"temp": 1.0, "top_k": 1},
    ],
)
def test_extreme_values_keep_the_likeliest(options):
    logits = mx.array([[0.0, 60000.0, 1.0]]).astype(mx.float16)
    assert choose_tokens(logits, Sampling(**options)).tolist() == [1]
    probs = np.exp(np.array(distribution(logits, Sampling(**options))))
    np.testing.assert_array_equal(probs, [[0, 1, 0]])


@given(st.integers(0, 999), st.integers(0, 14))
def test_logprobs_are_the_models_own(seed, count):
    logits = np.random.default_rng(seed).normal(0, 3, (3, 12)).astype(np.float32)
    tokens = np.array([0, 11, 5], np.int32)
    chosen, ids, values = map(
        np.array, top_logprobs(mx.array(logits), mx.array(tokens), count)
    )
    logprobs = np.log([softmax(row) for row in logits])
    order = np.argsort(-logits, axis=-1)[:, :count]
    np.testing.assert_allclose(chosen, logprobs[np.arange(3), tokens], atol=1e-5)
    np.testing.assert_array_equal(ids, order)
    expected = np.take_along_axis(logprobs, order, axis=-1)
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_no_value_is_read_back_while_a_graph_is_built(tmp_path):
    sampling = Sampling(
        min_tokens=3,
        temp=0.8,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.2,
        no_repeat_ngram=2,
        logit_bias=((1, 2.0),),
    )

    def step(logits, history, written):
        shaped = shape_logits(logits, history, sampling, written=written, eos_id=2)
        tokens = choose_tokens(shaped, sampling)
        return (distribution(shaped, sampling), *top_logprobs(logits, tokens, 3))

    # Exporting traces the function, in which reading a value is an error.
    mx.export_function(
        str(tmp_path / "step"),
        step,
        mx.zeros((2, 8)),
        mx.zeros((2, 5), mx.int32),
        mx.array([0, 1]),
    )


@pytest.mark.interop
@given(st.integers(0, 999), filters)
def test_the_filters_equal_those_of_transformers(seed, options):
    torch = pytest.importorskip("torch")
    from transformers import generation as hf

    logits = np.random.default_rng(seed).normal(0, 2, (3, 14)).astype(np.float32)
    theirs = hf.LogitsProcessorList()
    if "top_p" in options:
        mass = np.cumsum([np.sort(softmax(row))[::-1] for row in logits], axis=-1)
        if np.abs(mass - options["top_p"]).min() < 1e-5:
            return  # a border below float32's precision
        theirs.append(hf.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        theirs.append(hf.MinPLogitsWarper(options["min_p"]))
    if "top_k" in options:
        theirs.append(hf.TopKLogitsWarper(options["top_k"]))
    # These processors ignore the history.
    expected = theirs(torch.zeros((3, 1), dtype=torch.long), torch.tensor(logits))
    actual = keep_likely(mx.array(logits), Sampling(temp=1.0, **options))
    np.testing.assert_array_equal(np.array(actual), expected.numpy())


def test_given_options_take_precedence_over_the_models_defaults():
    defaults = {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
    }
    assert Sampling.from_defaults(defaults).temp == 0.8
    actual = Sampling.from_defaults(defaults, {"temp": 0.0, "top_k": None})
    assert (actual.temp, actual.top_p, actual.repetition_penalty) == (0.0, 0.9, 1.0)
    greedy = Sampling.from_defaults({"temperature": 0.8, "repetition_penalty": 1.2})
    assert (greedy.temp, greedy.repetition_penalty) == (0.0, 1.2)
    assert Sampling.from_defaults({"do_sample": True}).temp == 1.0
    lengths = {"max_new_tokens": 9, "min_new_tokens": 3, "no_repeat_ngram_size": 4}
    actual = Sampling.from_defaults(lengths, {"max_tokens": 8})
    assert (actual.max_tokens, actual.min_tokens, actual.no_repeat_ngram) == (8, 3, 4)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("temp", -0.1),
        ("temp", float("nan")),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("stop", ("",)),
        ("stop", (5,)),
        ("min_tokens", -1),
        ("no_repeat_ngram", -2),
        ("no_repeat_ngram", 1.5),
        ("stop_loops", 1),
        ("logprobs", 21),
        ("seed", "one"),
        ("logit_bias", ((5, float("nan")),)),
        ("logit_bias", ((5, float("inf")),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", (("king", 1.0),)),
        ("logit_bias", ((True, 1.0),)),
        ("logit_bias", (5, 1.0)),
    ],
)
def test_an_invalid_value_is_refused_with_the_options_name(option, value):
    with pytest.raises(OpenELMError, match=f"`{option}`"):
        Sampling(**{option: value})
