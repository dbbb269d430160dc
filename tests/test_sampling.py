import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from mlx_openelm.errors import OpenELMError
from mlx_openelm.sampling import (
    Sampling,
    choose_token,
    keep_likely,
    penalize_repetition,
)

logit_lists = st.lists(
    st.floats(-8, 8, width=32, allow_subnormal=False),
    min_size=3,
    max_size=12,
    unique=True,
)


def kept(logits, **options):
    filtered = keep_likely(mx.array([logits]), Sampling(temp=1.0, **options))
    return {i for i, x in enumerate(np.array(filtered)[0]) if x > -np.inf}


def softmax(logits):
    exp = np.exp(np.array(logits, np.float64) - max(logits))
    return exp / exp.sum()


@given(logit_lists, st.floats(0.05, 0.99))
def test_top_p_keeps_the_smallest_set_of_that_mass(logits, top_p):
    probs = softmax(logits)
    # By the logits: two that differ by less than exp can see have one probability.
    order = np.argsort(-np.array(logits, np.float32), kind="stable")
    mass = np.cumsum(probs[order])
    if np.abs(mass - top_p).min() < 1e-5:
        return  # a border that float32 cannot see
    count = int(np.searchsorted(mass, top_p)) + 1
    assert kept(logits, top_p=top_p) == set(order[:count].tolist())


@given(logit_lists, st.integers(1, 12))
def test_top_k_keeps_the_k_likeliest(logits, top_k):
    order = np.argsort(-np.array(logits, np.float32), kind="stable")
    assert kept(logits, top_k=top_k) == set(order[:top_k].tolist())


@given(logit_lists, st.floats(0.01, 0.9))
def test_min_p_keeps_what_is_likely_beside_the_likeliest(logits, min_p):
    probs = softmax(logits)
    share = probs / probs.max()
    if np.abs(share - min_p).min() < 1e-5:
        return
    assert kept(logits, min_p=min_p) == set(np.flatnonzero(share >= min_p).tolist())


def test_filters_that_are_off_keep_everything():
    assert kept([3.0, -50.0, 0.0]) == {0, 1, 2}
    assert kept([3.0, -50.0, 0.0], top_p=1.0, top_k=0, min_p=0.0) == {0, 1, 2}


def test_sampling_follows_the_tempered_distribution():
    mx.random.seed(0)
    logits = mx.array([[1.0, 0.0, -1.0, 0.5]])
    sampling = Sampling(temp=0.7)
    draws = [int(choose_token(logits, sampling).item()) for _ in range(4000)]
    found = np.bincount(draws, minlength=4) / len(draws)
    expected = softmax(np.array(logits)[0] / 0.7)
    assert np.abs(found - expected).max() < 4 * 0.5 / np.sqrt(len(draws))


def test_temperature_zero_is_the_argmax():
    assert int(choose_token(mx.array([[0.1, 0.3, 0.2]]), Sampling()).item()) == 1


@pytest.mark.interop
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.floats(1.01, 3))
def test_the_penalty_is_mlx_lms(recent, penalty):
    from mlx_lm.sample_utils import make_repetition_penalty

    logits = mx.array([[1.0, -1.0, 2.0, -2.0, 0.5, 0.0]])
    theirs = make_repetition_penalty(penalty, len(recent))
    expected = np.array(theirs(mx.array(recent), mx.array(logits)))
    found = penalize_repetition(logits, mx.array(recent), penalty)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-6)


def test_what_a_person_said_wins_over_the_models_defaults():
    defaults = {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
    }
    assert Sampling.from_defaults(defaults).temp == 0.8
    found = Sampling.from_defaults(defaults, {"temp": 0.0, "top_k": None})
    assert (found.temp, found.top_p, found.repetition_penalty) == (0.0, 0.9, 1.1)
    greedy = Sampling.from_defaults({"temperature": 0.8, "repetition_penalty": 1.2})
    assert (greedy.temp, greedy.repetition_penalty) == (0.0, 1.2)
    assert Sampling.from_defaults({"do_sample": True}).temp == 1.0


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
    ],
)
def test_values_without_sense_are_refused_by_their_flag(option, value):
    with pytest.raises(OpenELMError, match="--" + option.replace("_", "-")):
        Sampling(**{option: value})
