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
    history_length,
    shape_logits,
)

TOKENS, EOS = 8, 7
token_lists = st.lists(st.integers(0, TOKENS - 2), min_size=1, max_size=14)
batches = st.lists(token_lists, min_size=1, max_size=3)


def shape(logits, texts, sampling, *, written=0, padding=3):
    """Shape a row of logits for each text, padded with `padding` more places."""
    length = max(map(len, texts)) + padding
    history = [[-1] * (length - len(text)) + text for text in texts]
    shaped = shape_logits(
        mx.array(logits), mx.array(history), sampling, written=written, eos_id=EOS
    )
    return np.array(shaped)


def some_logits(rows, seed=0):
    return np.random.default_rng(seed).normal(0, 3, (rows, TOKENS)).astype(np.float32)


def banned(row):
    return set(np.flatnonzero(row == -np.inf).tolist())


def repeats_a_run(text, size):
    runs = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
    return len(set(runs)) < len(runs)


@given(batches, st.integers(1, 5))
def test_exactly_the_tokens_that_repeat_an_ngram_are_banned(texts, size):
    shaped = shape(some_logits(len(texts)), texts, Sampling(no_repeat_ngram=size))
    for text, row in zip(texts, shaped, strict=True):
        runs = {tuple(text[i : i + size]) for i in range(len(text) - size + 1)}
        tail = tuple(text[len(text) - size + 1 :])
        assert banned(row) == {t for t in range(TOKENS) if (*tail, t) in runs}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_occurs_twice(size):
    sampling = Sampling(no_repeat_ngram=size)
    logits, text = some_logits(1), [0]
    logits[0, EOS] = -99  # drawn only if all others are banned
    while len(text) < 999:
        shaped = shape(logits, [text], sampling)
        token = int(choose_tokens(mx.array(shaped), sampling).item())
        if token == EOS:
            break
        text.append(token)
    assert not repeats_a_run(text, size)
    assert len(text) >= TOKENS - 1
    assert token == EOS


def test_eos_is_never_a_repetition():
    shaped = shape(some_logits(1), [[3, EOS, 3]], Sampling(no_repeat_ngram=2))
    assert banned(shaped[0]) == set()


def test_a_row_keeps_its_logits_if_every_token_would_be_banned():
    used_up, fresh = list(range(TOKENS - 1)), [0, 1, 2]
    sampling = Sampling(temp=1.0, no_repeat_ngram=1, min_tokens=5)
    logits = some_logits(2)
    shaped = shape(logits, [used_up, fresh], sampling)
    assert banned(shaped[0]) == {EOS}
    assert banned(shaped[1]) == {0, 1, 2, EOS}
    np.testing.assert_array_equal(shaped[0, :EOS], logits[0, :EOS])
    assert not np.isnan(np.array(distribution(mx.array(shaped), sampling))).any()
    shaped = shape(logits, [used_up, fresh], Sampling(no_repeat_ngram=1))
    assert banned(shaped[0]) == set(used_up)


@pytest.mark.parametrize("written", [3, mx.array([3, 3]), mx.array([0, 4])])
def test_eos_is_banned_before_min_tokens(written):
    sampling, logits = Sampling(min_tokens=4), some_logits(2)
    shaped = shape(logits, [[1], [1]], sampling, written=written)
    early = np.broadcast_to(np.array(written) < 4, (2,))
    assert [banned(row) for row in shaped] == [{EOS} if e else set() for e in early]
    np.testing.assert_array_equal(shaped[:, :EOS], logits[:, :EOS])


def test_a_bias_bans_forces_and_adds():
    logits = some_logits(2)
    likeliest = int(logits[0].argmax())
    for bias in ((3, 100), (likeliest, -100)):
        sampling = Sampling(logit_bias=(bias,), repetition_penalty=1.5)
        shaped = mx.array(shape(logits, [[0], [3]], sampling))
        chosen = choose_tokens(shaped, sampling).tolist()
        assert chosen == [3, 3] if bias[1] > 0 else likeliest not in chosen
    pairs = ((1, 0.5), (4, -2), (1, 0.25))
    expected = logits.copy()
    expected[:, 1] += 0.75
    expected[:, 4] -= 2
    shaped = shape(logits, [[0], [0]], Sampling(logit_bias=pairs))
    np.testing.assert_allclose(shaped, expected, rtol=1e-6)
    with pytest.raises(OpenELMError, match=r"token 8; .* 0 to 7"):
        shape(logits, [[0], [0]], Sampling(logit_bias=((TOKENS, 1.0),)))


@given(token_lists, st.integers(1, 6))
def test_the_penalty_covers_its_context(text, context):
    logits = some_logits(1)
    sampling = Sampling(repetition_penalty=2.0, repetition_context=context)
    shaped = shape(logits, [text], sampling)
    changed = set(np.flatnonzero(shaped[0] != logits[0]).tolist())
    assert changed == set(text[-context:])
    needed = history_length(sampling, 64)
    assert needed == context
    short = ([-1] * context + text)[-needed:]
    np.testing.assert_array_equal(shape(logits, [short], sampling, padding=0), shaped)


@given(batches, st.integers(0, 99))
def test_a_row_does_not_depend_on_other_rows_or_padding(texts, seed):
    sampling = Sampling(
        min_tokens=4,
        repetition_penalty=1.3,
        repetition_context=5,
        no_repeat_ngram=2,
        logit_bias=((2, 1.5),),
    )
    logits = some_logits(len(texts), seed)
    written = mx.array([2 * row for row in range(len(texts))])
    together = shape(logits, texts, sampling, written=written)
    for row, text in enumerate(texts):
        alone = shape(
            logits[row : row + 1], [text], sampling, written=2 * row, padding=0
        )
        np.testing.assert_array_equal(together[row], alone[0])


def test_a_history_without_a_token_penalizes_nothing():
    logits = some_logits(1)
    shaped = shape(logits, [[]], Sampling(repetition_penalty=2.0, no_repeat_ngram=1))
    np.testing.assert_array_equal(shaped, logits)


def test_without_controls_the_logits_are_returned_unchanged():
    logits, nothing = mx.zeros((1, TOKENS), mx.bfloat16), mx.zeros((1, 0), mx.int32)
    for sampling in (Sampling(), Sampling(temp=1.0, top_p=0.5), Sampling(min_tokens=3)):
        assert history_length(sampling, 2048) == 0
        shaped = shape_logits(logits, nothing, sampling, written=3, eos_id=EOS)
        assert shaped is logits
    assert history_length(Sampling(no_repeat_ngram=3), 2048) == 2048
    assert history_length(Sampling(repetition_penalty=1.1), 64) == 64


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_shaped_in_float32(dtype):
    logits = mx.array(some_logits(2)).astype(dtype)
    # 0.25 apart, which bfloat16 cannot represent near 100.
    sampling = Sampling(logit_bias=((1, 100.0), (2, 100.25)), repetition_penalty=1.1)
    shaped = shape(logits, [[1, 2], [3]], sampling)
    expected = shape(logits.astype(mx.float32), [[1, 2], [3]], sampling)
    np.testing.assert_array_equal(shaped, expected)
    assert shaped.dtype == np.float32


# Other implementations -----------------------------------------------------------


@pytest.mark.interop
@given(
    token_lists,
    st.integers(0, 99),
    st.floats(0.5, 3),
    st.integers(0, 4),
    st.integers(0, 14),
    st.dictionaries(st.integers(0, TOKENS - 1), st.floats(-9, 9), max_size=3),
)
def test_the_controls_equal_those_of_transformers(
    text, seed, penalty, size, min_tokens, bias
):
    torch = pytest.importorskip("torch")
    from transformers import generation as hf

    prompt_length = len(text) // 2
    theirs = hf.LogitsProcessorList()
    if bias:
        ids = {(token,): value for token, value in bias.items()}
        theirs.append(hf.SequenceBiasLogitsProcessor(ids))
    theirs.append(hf.MinNewTokensLengthLogitsProcessor(prompt_length, min_tokens, EOS))
    theirs.append(hf.RepetitionPenaltyLogitsProcessor(penalty))
    if size:
        theirs.append(hf.NoRepeatNGramLogitsProcessor(size))
    logits = some_logits(1, seed)
    expected = theirs(torch.tensor([text]), torch.tensor(logits)).numpy()
    if (expected == -np.inf).all():
        return  # a deliberate difference, tested above
    sampling = Sampling(
        min_tokens=min_tokens,
        repetition_penalty=penalty,
        no_repeat_ngram=size,
        logit_bias=tuple(bias.items()),
    )
    shaped = shape(logits, [text], sampling, written=len(text) - prompt_length)
    np.testing.assert_allclose(shaped, expected, rtol=1e-5)


@pytest.mark.interop
@given(token_lists, st.floats(1.01, 3))
def test_the_penalty_equals_that_of_mlx_lm(recent, penalty):
    from mlx_lm.sample_utils import make_repetition_penalty

    logits = some_logits(1)
    theirs = make_repetition_penalty(penalty, len(recent))
    expected = np.array(theirs(mx.array(recent), mx.array(logits)))
    shaped = shape(logits, [recent], Sampling(repetition_penalty=penalty))
    np.testing.assert_allclose(shaped, expected, rtol=1e-6)
