"""Speculative decoding: same tokens, same distribution, draft length."""

import itertools
import random
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import UNEVEN, build, small_tokenizer

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation import draft_pacing as pacing
from mlx_openelm.generation import speculation
from mlx_openelm.generation.compact_caches import SlidingKVCache
from mlx_openelm.generation.decoding import Context, draw_tokens
from mlx_openelm.generation.draft_pacing import Pace
from mlx_openelm.generation.drafters import (
    Draft,
    Drafter,
    LookupDrafter,
    ModelDrafter,
    check_draft,
)
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.sampling import distribution, shape_logits
from mlx_openelm.generation.speculation import draw_speculatively

model, other = build(UNEVEN), build(UNEVEN, seed=5)


class FixedPace:
    """Always drafts, with the given lengths in turn."""

    def __init__(self, *counts):
        self._counts = itertools.cycle(counts)

    def choose(self, most):
        return max(0, min(most, next(self._counts)))

    def begin(self):
        pass

    def record_step(self, queued):
        pass

    def record_round(self, drafted, right):
        pass

    def record_draft(self, right):
        pass


class Scripted(Drafter):
    """Drafts the result of a function of the text."""

    is_free = False

    def __init__(self, draft, length=4):
        super().__init__(length, "length")
        self._draft = draft

    def begin(self, prompt):
        pass

    def propose(self, text, count, sampler):
        tokens = self._draft(list(text), count)[:count]
        return Draft(mx.array(tokens)) if tokens else None


def always(drafter, *counts):
    drafter.pace = FixedPace(*(counts or (drafter.length,)))
    return drafter


def write(drafter, prompt, count, sampling=None, **options):
    sampling = sampling or Sampling()
    if drafter is None:
        drawn = draw_tokens(model, prompt, sampling, count, **options)
    else:
        drawn = draw_speculatively(model, prompt, sampling, count, drafter, **options)
    return list(drawn)


def ids(tokens):
    return [token.id for token in tokens]


# Greedy: the same tokens ----------------------------------------------------------

prompts = st.lists(st.integers(3, 40), min_size=1, max_size=40)
controls = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    repetition_context=st.sampled_from([4, 256]),
    no_repeat_ngram=st.sampled_from([0, 0, 2, 3]),
    min_tokens=st.sampled_from([0, 0, 9]),
    logit_bias=st.sampled_from([(), ((7, 2.0), (2, 3.0))]),
)


@settings(max_examples=60)
@given(
    prompts,
    st.integers(1, 24),
    controls,
    st.sampled_from(["lookup", "same model", "another model"]),
    st.lists(st.integers(0, 8), min_size=1, max_size=6).filter(any),
)
def test_greedy_tokens_equal_those_of_plain_decoding(
    prompt, count, sampling, kind, counts
):
    plain = write(None, prompt, count, sampling)
    drafter = {
        "lookup": lambda: LookupDrafter(8),
        "same model": lambda: ModelDrafter(model, 8),
        "another model": lambda: ModelDrafter(other, 8),
    }[kind]()
    context = Context(model)
    tokens = write(always(drafter, *counts), prompt, count, sampling, context=context)
    assert ids(tokens) == ids(plain)
    assert context.tokens == [*prompt, *ids(plain)][:-1]
    assert {layer.offset for layer in context.cache} == {len(context.tokens)}


def test_the_tokens_do_not_depend_on_the_clock():
    for seed in range(6):
        prompt = random.Random(seed).choices(range(3, 30), k=20)
        plain = ids(write(None, prompt, 40))
        assert ids(write(LookupDrafter(4), prompt, 40)) == plain
        assert ids(write(ModelDrafter(other), prompt, 40)) == plain


@pytest.mark.parametrize("least", range(9))
def test_eos_is_drawn_from_min_tokens_on_and_not_before(least):
    sampling = Sampling(min_tokens=least, logit_bias=((2, 1e3),))
    drafter = always(ModelDrafter(model), 3)
    tokens = ids(write(drafter, [1, 7], 14, sampling))
    assert tokens == ids(write(None, [1, 7], 14, sampling))
    assert [token == 2 for token in tokens] == [i >= least for i in range(14)]


def test_a_model_accepts_all_of_its_own_drafts():
    drafter = always(ModelDrafter(model), 4, 1, 3)
    write(drafter, [1, 7, 9], 50)
    assert drafter.accepted == drafter.drafted > 30


@pytest.mark.parametrize("right", range(6))
def test_every_number_of_right_draft_tokens_is_accepted(right):
    plain = ids(write(None, [1, 7], 20))

    def draft(text, count):
        start = len(text) - 2
        true = plain[start : start + count]
        return [t if i < right else (t + 1) % 300 for i, t in enumerate(true)]

    drafter = always(Scripted(draft, length=5))
    tokens = write(drafter, [1, 7], 20)
    assert ids(tokens) == plain
    assert drafter.accepted == sum(token.drafted for token in tokens)
    rounds = -(-19 // (right + 1))
    assert drafter.accepted == 19 - rounds
    marks = "".join("x" if token.drafted else "." for token in tokens)
    assert marks == ("." + ("x" * right + ".") * 20)[:19] + "."


def test_a_draft_is_limited_by_max_tokens_and_the_context():
    requests = []

    def draft(text, count):
        requests.append((len(text), count))
        return [5] * count

    drafter = always(Scripted(draft, length=8))
    write(drafter, [1] * 50, 12)
    assert requests
    assert all(count <= 50 + 12 - length - 1 for length, count in requests)
    assert all(count <= 64 - length for length, count in requests)


@pytest.mark.parametrize("taken", range(1, 12))
def test_a_context_can_be_reused_after_stopping_at_any_token(taken):
    prompt, sampling = [1, 9, 4, 9, 4], Sampling()
    plain = ids(write(None, prompt, 12))
    for drafter in (ModelDrafter(model), LookupDrafter(3), ModelDrafter(other)):
        context = Context(model)
        stream = draw_speculatively(
            model, prompt, sampling, 12, always(drafter), context=context
        )
        assert ids(itertools.islice(stream, taken)) == plain[:taken]
        stream.close()
        text = [*prompt, *plain[:taken]]
        assert context.tokens in (text, text[:-1])
        assert context.cache[0].offset >= len(context.tokens)
        further = [*text, 8, 3]
        assert ids(write(always(drafter), further, 10, context=context)) == ids(
            write(None, further, 10)
        )


def test_the_logprobs_are_those_of_plain_decoding():
    sampling = Sampling(logprobs=3, repetition_penalty=1.2)
    plain = write(None, [1, 7], 20, sampling)
    tokens = write(always(ModelDrafter(model)), [1, 7], 20, sampling)
    assert any(token.drafted for token in tokens)
    for ours, theirs in zip(tokens, plain, strict=True):
        assert ours.id == theirs.id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [i for i, _ in ours.alternatives] == [i for i, _ in theirs.alternatives]


def test_a_draft_model_may_have_a_smaller_context():
    short = build(replace(UNEVEN, max_context_length=16), seed=5)
    for length in (3, 10, 14, 15, 16, 17, 30):
        prompt = list(range(3, 3 + length))
        drafter = always(ModelDrafter(short))
        assert ids(write(drafter, prompt, 20)) == ids(write(None, prompt, 20))
        assert (drafter.drafted > 0) == (length < 15)


@pytest.mark.parametrize("size", [8, 12, 16, 20])
def test_drafting_stops_when_a_sliding_cache_slides(size):
    def slide():
        return Context(model, lambda: SlidingKVCache(size, keep=2))

    plain = ids(write(None, [1, 7, 9], 30, context=slide()))
    for drafter in (ModelDrafter(model), ModelDrafter(other)):
        assert ids(write(always(drafter), [1, 7, 9], 30, context=slide())) == plain
        assert drafter.drafted > 0
        assert "sliding cache" in drafter.note


def test_equal_logits_are_counted_in_16_bits():
    coarse = build(UNEVEN)
    coarse.set_dtype(mx.bfloat16)
    table = coarse.transformer.token_embeddings.weight
    coarse.transformer.token_embeddings.weight = mx.concatenate([table[:150]] * 2)
    drafter = always(ModelDrafter(coarse))
    tokens = list(draw_speculatively(coarse, [1, 7], Sampling(), 21, drafter))
    rounds = 20 - drafter.accepted
    assert drafter.equal_ties == drafter.accepted + rounds == len(tokens) - 1
    exact = always(ModelDrafter(model))
    write(exact, [1, 7], 21)
    assert exact.equal_ties == 0


# Sampled: the same distribution ---------------------------------------------------


class Chain:
    """A model whose logits depend on the last token alone: a Markov chain."""

    def __init__(self, seed, scale=1.0):
        self.config = replace(UNEVEN, vocab_size=5, max_context_length=10**6)
        self.layers = [None]
        rng = np.random.default_rng(seed)
        self._logits = mx.array(rng.normal(scale=scale, size=(5, 5)), mx.float32)

    def transformer(self, tokens, cache):
        cache[0].offset += tokens.shape[1]
        return self._logits[tokens]

    def head(self, hidden):
        return hidden


chain, other_chain = Chain(1), Chain(2, scale=2.0)
LENGTH = 3000


def exact_chances(sampling):
    """Return the distribution after each pair of tokens, which the controls use."""
    chances = {}
    for pair in itertools.product(range(5), repeat=2):
        shaped = shape_logits(
            chain.transformer(mx.array([pair]), Context(chain).cache)[:, -1],
            mx.array([pair]),
            sampling,
            written=99,
            eos_id=2,
        )
        chances[pair] = np.exp(np.array(distribution(shaped, sampling)[0], np.float64))
    return chances


def deviation(drafter, sampling):
    """Return by how many standard deviations chi-square exceeds its mean."""
    mx.random.seed(11)
    drawn = draw_speculatively(chain, [1, 3], sampling, LENGTH, drafter)
    text = [1, 3, *ids(drawn)]
    counts = Counter(zip(text, text[1:], text[2:], strict=False))
    chi_square, freedom = 0.0, 0
    for pair, chances in exact_chances(sampling).items():
        tokens = np.array([counts[*pair, token] for token in range(5)])
        expected = chances * tokens.sum()
        assert not tokens[chances == 0].any(), "a token of probability 0 was drawn"
        many = expected >= 5
        cells = [*zip(tokens[many], expected[many], strict=True)]
        if expected[~many].sum() >= 5:
            cells.append((tokens[~many].sum(), expected[~many].sum()))
        if len(cells) > 1:
            chi_square += sum((n - e) ** 2 / e for n, e in cells)
            freedom += len(cells) - 1
    assert freedom > 20
    return (chi_square - freedom) / (2 * freedom) ** 0.5


DRAFTERS = {
    "lookup": lambda: LookupDrafter(3),
    "a constant": lambda: Scripted(lambda text, count: [3, 4, 3][:count]),
    "another model": lambda: ModelDrafter(other_chain, 3),
}
SAMPLINGS = {
    "warm": Sampling(temp=1.3),
    "controlled": Sampling(
        temp=1.2,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.4,
        repetition_context=2,
        logit_bias=((2, 1.0), (4, -0.5)),
    ),
}


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_sampled_text_has_the_distribution_of_plain_decoding(kind, name):
    drafter = always(DRAFTERS[kind]())
    assert abs(deviation(drafter, SAMPLINGS[name])) < 3.5
    assert 0 < drafter.accepted < drafter.drafted


def redraw_from_everything(shaped, draft, sampling):
    """Resample a rejected token from the model's whole distribution, which is wrong."""
    own = distribution(shaped, sampling)
    drafted, count = draft.tokens[:, None], draft.tokens.size
    ratios = mx.take_along_axis(own[:count], drafted, axis=-1)[:, 0]
    if draft.logprobs is not None:
        ratios -= mx.take_along_axis(draft.logprobs, drafted, axis=-1)[:, 0]
    right = mx.log(mx.random.uniform(shape=(count,))) < ratios
    right = mx.cumprod(right.astype(mx.int32)).sum()
    tokens = mx.random.categorical(own).astype(mx.int32)
    padded = mx.concatenate([draft.tokens, tokens[-1:]])
    return mx.where(mx.arange(count + 1) < right, padded, tokens), right


@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_wrong_acceptance_rule_is_detected(kind, monkeypatch):
    monkeypatch.setattr(speculation, "accept", redraw_from_everything)
    assert deviation(always(DRAFTERS[kind]()), SAMPLINGS["warm"]) > 6


def test_a_seed_repeats_a_sampled_text():
    def draw():
        mx.random.seed(3)
        drafter = always(ModelDrafter(other))
        return ids(write(drafter, [1, 7], 30, Sampling(temp=0.8, top_p=0.9)))

    assert draw() == draw()


# Prompt lookup --------------------------------------------------------------------


def looked_up(text, count=4):
    draft = LookupDrafter(8).propose(text, count, None)
    return draft and draft.tokens.tolist()


def test_the_continuation_of_the_last_match_is_drafted():
    assert looked_up([5, 6, 7, 8, 9, 1, 5, 6]) == [7, 8, 9, 1]
    assert looked_up([5, 6, 7, 0, 5, 6, 8, 0, 5, 6], 1) == [8]  # the newest match
    assert looked_up([4, 5, 6, 7, 0, 9, 5, 6, 8, 0, 4, 5, 6], 1) == [
        7
    ]  # the longest match
    assert looked_up([1, 2, 3, 4]) is None
    assert looked_up([5]) is None
    assert looked_up([]) is None


def test_a_loop_is_drafted_beyond_the_end_of_the_text():
    assert looked_up([9, 5, 6, 7, 5, 6, 7, 5, 6], 8) == [7, 5, 6, 7, 5, 6, 7, 5]


@given(st.lists(st.integers(0, 3), max_size=40))
def test_the_incremental_index_equals_a_full_scan(text):
    drafter = LookupDrafter(4)
    for end in range(len(text) + 1):
        prefix = text[:end]
        expected = None
        for size in (4, 3, 2):
            starts = [
                i for i in range(end - size) if prefix[i : i + size] == prefix[-size:]
            ]
            if size <= end and starts:
                expected = prefix[starts[-1] + size]
                break
        assert drafter.peek(prefix) == expected


# Draft length ---------------------------------------------------------------------


def simulate(rate, *, length, count, verification, draft=0.0, free=False, seed=0):
    """Return the speedup over plain decoding on a clock with plain steps of 1."""
    rng, now = random.Random(seed), [0.0]
    patch = pytest.MonkeyPatch()
    patch.setattr(pacing.time, "perf_counter", lambda: now[0])
    pace, left, queued, took = Pace(length), count, False, 0.0
    while left:
        ends = False
        while not ends:
            ends = left == 1 or pace.choose(left - 2) > 0
            now[0] += took
            took = 1.0
            pace.record_step(queued)
            if free:
                pace.record_draft(rng.random() < rate)
            left, queued = left - 1, True
        queued = False
        while drafted := pace.choose(left - 1):
            right = 0
            while right < drafted and rng.random() < rate:
                right += 1
            now[0] += verification(drafted + 1) + draft * drafted
            pace.record_round(drafted, right)
            left -= right + 1
    patch.undo()
    return (count - 1) / now[0]


def linear(tokens):
    return 1 + 0.1 * (tokens - 1)


@pytest.mark.parametrize("count", [16, 32, 100, 1000])
@pytest.mark.parametrize("draft", [0.0, 0.1, 0.3, 0.6])
def test_rejected_drafts_cost_less_than_a_twentieth(count, draft):
    for seed, length in itertools.product(range(3), (1, 4, 16)):
        speed = simulate(
            0.0,
            length=length,
            count=count,
            verification=linear,
            draft=draft,
            free=draft == 0,
            seed=seed,
        )
        assert speed > (0.985 if count == 1000 else 0.95)


def test_accepted_drafts_are_faster():
    def mean(rate, **options):
        return np.mean(
            [
                simulate(rate, length=4, verification=linear, seed=seed, **options)
                for seed in range(10)
            ]
        )

    assert mean(0.7, count=400, free=True) > 1.85  # 2.77 tokens in 1.4 steps: 1.98
    assert mean(0.95, count=400, draft=0.1) > 2.2  # 4.52 tokens in 1.8 steps: 2.5
    assert mean(0.2, count=400, free=True) > 1.0  # one draft token at a time
    assert mean(0.5, count=400, draft=1.0) > 0.97  # never faster


def test_a_shorter_draft_is_tried_if_a_length_is_too_slow():
    def uneven(tokens):
        return 1.2 if tokens <= 4 else 6.0

    assert simulate(0.9, length=8, count=400, verification=uneven, free=True) > 2


# Bad input ------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, -1, 33, 10**9, 2.5, True, None])
def test_an_invalid_length_is_refused(length):
    with pytest.raises(OpenELMError, match=r"`lookup` is .*1 to 32"):
        LookupDrafter(length)
    with pytest.raises(OpenELMError, match="draft"):
        ModelDrafter(other, length)


def test_a_draft_of_another_vocabulary_is_refused():
    tokenizer = small_tokenizer()
    check_draft(model, tokenizer, other, tokenizer)
    wider = build(replace(UNEVEN, vocab_size=320))
    with pytest.raises(OpenELMError, match=r"320 rows.*300"):
        check_draft(model, tokenizer, wider, tokenizer)
    with pytest.raises(OpenELMError, match=r"320 pieces, not 300"):
        check_draft(model, tokenizer, other, small_tokenizer(320))
