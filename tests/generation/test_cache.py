import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SCALED, UNEVEN, build

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.cache import KVCache
from mlx_openelm.generation.compact_caches import (
    QuantizedKVCache,
    SlidingKVCache,
    cache_maker,
)
from mlx_openelm.generation.decoding import Context, draw_tokens
from mlx_openelm.generation.options import CacheOptions, Sampling

model, scaled = build(UNEVEN), build(SCALED)
rng = np.random.default_rng(0)

splits = st.lists(st.integers(1, 30), min_size=1, max_size=12).filter(
    lambda chunks: sum(chunks) <= 90
)


def tokens_of(count):
    return rng.integers(3, UNEVEN.vocab_size, count).tolist()


def logits_in(chunks, tokens, caches, of=model):
    """Return all logits of a text that is processed in these chunks."""
    out, start = [], 0
    for length in chunks:
        part = mx.array([tokens[start : start + length]])
        out.append(np.array(of(part, caches))[0])
        start += length
    return np.concatenate(out)


def random_kv(length, width=32, heads=3):
    return [mx.array(rng.standard_normal((1, heads, length, width))) for _ in range(2)]


# Sliding window ------------------------------------------------------------------


class WholeText:
    """No cache: all tokens in one pass, with the mask of a sliding window."""

    offset = 0

    def __init__(self, max_size, keep):
        self.max_size, self.keep = max_size, keep

    def update_and_fetch(self, keys, values):
        return keys, values

    def make_mask(self, num_tokens, return_array, window_size):
        seen = np.zeros((num_tokens, num_tokens), bool)
        for query in range(num_tokens):
            first = [key for key in range(query + 1) if key < self.keep]
            others = [key for key in range(query + 1) if key >= self.keep]
            newest = others[max(0, len(others) - (self.max_size - self.keep)) :]
            seen[query, first + newest] = True
        return mx.array(seen)


@settings(max_examples=120, deadline=None)
@given(splits, st.integers(5, 40), st.integers(0, 4))
def test_a_token_attends_to_the_first_and_the_newest_for_all_chunks(chunks, size, keep):
    tokens = tokens_of(sum(chunks))
    expected = logits_in([len(tokens)], tokens, [WholeText(size, keep)] * 3)
    actual = logits_in(chunks, tokens, [SlidingKVCache(size, keep) for _ in range(3)])
    np.testing.assert_allclose(actual, expected, atol=2e-4)


@pytest.mark.interop
@pytest.mark.parametrize(
    ("keep", "chunks"),
    [
        (4, [9] + [1] * 60),
        (4, [16] + [1] * 30),
        (0, [9, 20, 1, 1, 5, 1, 30]),
        (0, [40, 1, 1, 25]),
    ],
)
def test_mlx_lms_rotating_cache_gives_the_same_logits(keep, chunks):
    from mlx_lm.models.cache import RotatingKVCache

    tokens = tokens_of(sum(chunks))
    theirs = logits_in(chunks, tokens, [RotatingKVCache(16, keep) for _ in range(3)])
    ours = logits_in(chunks, tokens, [SlidingKVCache(16, keep) for _ in range(3)])
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_a_sliding_cache_equals_a_full_one_until_it_is_full():
    tokens = tokens_of(30)
    sliding = logits_in([7, 1, 22], tokens, [SlidingKVCache(30) for _ in range(3)])
    plain = logits_in([7, 1, 22], tokens, [KVCache() for _ in range(3)])
    assert (sliding == plain).all()


def test_a_text_longer_than_the_context_takes_no_more_memory():
    context = Context(model, cache_maker(UNEVEN, CacheOptions(max_kv_size=24)))
    answer = list(draw_tokens(model, [1, 7, 20], Sampling(), 200, context=context))
    assert len(answer) == 200 > UNEVEN.max_context_length
    assert context.cache[0].offset == 202
    for layer, K in zip(context.cache, UNEVEN.num_kv_heads, strict=True):
        assert [part.shape for part in layer.state] == [(2, 1, K, 24, 16)]


def test_a_cache_that_has_slid_is_rebuilt_instead_of_trimmed():
    cache = SlidingKVCache(10)
    cache.update_and_fetch(*random_kv(10))
    assert cache.can_trim(3)
    cache.update_and_fetch(*random_kv(1))
    assert not cache.can_trim(1)
    assert cache.can_trim(0)  # so a chat can continue
    context = Context(model, lambda: SlidingKVCache(10))
    prompt = tokens_of(14)
    context.read(model, prompt)
    assert context.reuse([*prompt, 5]) == 14
    assert context.reuse(prompt) == 0
    assert context.cache[0].offset == 0


def test_a_trimmed_sliding_cache_slides_correctly():
    tokens = tokens_of(40)
    caches = [SlidingKVCache(12) for _ in range(3)]
    logits_in([12], tokens_of(12), caches)
    for cache in caches:
        cache.trim(12)
    expected = logits_in([40], tokens, [WholeText(12, 4)] * 3)
    actual = logits_in([11, 1, 1, 9, 1, 17], tokens, caches)
    np.testing.assert_allclose(actual, expected, atol=2e-4)


# In one array --------------------------------------------------------------------


def test_tokens_given_apart_and_in_one_array_are_stored_in_order(monkeypatch):
    monkeypatch.setattr(KVCache, "step", 8)
    cache, (keys, values) = KVCache(), random_kv(40)
    pieces = (mx.split(x, [6, 7, 20, 21], axis=2) for x in (keys, values))
    for given_apart, *part in zip((1, 0, 1, 0, 1), *pieces, strict=True):
        if given_apart:
            seen = cache.update_and_fetch(*part)
        else:
            seen = cache.update_pair(mx.stack(part))
        cache.append(*part)
        cache.trim(part[0].shape[2])
        end = cache.offset
        for own, expected in zip((keys, values), cache.stored(), strict=True):
            assert mx.array_equal(own[:, :, :end], expected)
        for own, expected in zip((keys, values), seen, strict=True):
            assert mx.array_equal(own[:, :, :end], expected)


# Quantized -----------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (4, 64), (8, 64)])
def test_the_quantization_error_is_at_most_half_a_step(bits, group):
    cache, given = QuantizedKVCache(bits, group), random_kv(300, width=64)
    for start, end in ((0, 7), (7, 8), (8, 290), (290, 300)):
        actual = cache.update_and_fetch(*(x[..., start:end, :] for x in given))
    assert {part.shape[2] for part in cache.state} == {512}  # steps of 256
    for stored, exact in zip(actual, given, strict=True):
        groups = np.array(exact).reshape(-1, group)
        step = np.ptp(groups, axis=1, keepdims=True) / (2**bits - 1)
        off = np.abs(np.array(stored).reshape(-1, group) - groups)
        # MLX moves the scale so that zero is a step: up to one more at the far end.
        assert (off <= 1.01 * step).all()
        assert off.mean() < 0.3 * step.mean()


@pytest.mark.interop
def test_mlx_lms_quantized_cache_holds_the_same_bits():
    from mlx_lm.models.cache import QuantizedKVCache as Theirs

    ours, theirs, kv = QuantizedKVCache(4, 32), Theirs(32, 4), random_kv(270)
    for start, end in ((0, 5), (5, 261), (261, 270)):
        part = [x[..., start:end, :] for x in kv]
        ours.update_and_fetch(*part)
        keys, values = theirs.update_and_fetch(*part)
    for stored, other in zip(ours.state, [*keys, *values], strict=True):
        assert mx.array_equal(stored[..., :270, :], other)


@settings(max_examples=40, deadline=None)
@given(splits, st.data())
def test_a_packed_cache_does_not_depend_on_chunks_or_trimming(chunks, data):
    tokens = tokens_of(sum(chunks))
    whole = [QuantizedKVCache(8, 32) for _ in range(3)]
    expected = logits_in([len(tokens)], tokens, whole, scaled)
    caches = [QuantizedKVCache(8, 32) for _ in range(3)]
    actual = logits_in(chunks, tokens, caches, scaled)
    np.testing.assert_allclose(actual, expected, atol=0.02)
    count = data.draw(st.integers(0, len(tokens)))
    for cache in caches:
        assert cache.can_trim(count)
        cache.trim(count)
    if count:
        again = logits_in([count], tokens[-count:], caches, scaled)
        np.testing.assert_allclose(again, expected[-count:], atol=0.02)
    assert not caches[0].can_trim(len(tokens) + 1)


def test_logits_with_8_bits_are_close_to_full_precision():
    tokens = tokens_of(60)
    exact = logits_in([60], tokens, [KVCache() for _ in range(3)], scaled)
    packed = [QuantizedKVCache(8, 32) for _ in range(3)]
    actual = logits_in([30, 30], tokens, packed, scaled)
    assert np.abs(actual - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(("bits", "share"), [(4, 6 / 32), (8, 10 / 32)])
def test_a_quantized_cache_takes_less_memory(bits, share):
    plain, packed = KVCache(), QuantizedKVCache(bits, 32)
    for cache in (plain, packed):
        cache.update_and_fetch(*random_kv(500))
    sizes = [sum(part.nbytes for part in c.state) for c in (packed, plain)]
    assert sizes[0] == share * sizes[1]


# Options -------------------------------------------------------------------------


def test_options_become_caches():
    assert isinstance(cache_maker(SCALED, CacheOptions())(), KVCache)
    packed = cache_maker(SCALED, CacheOptions(kv_bits=4, kv_group_size=32))()
    assert isinstance(packed, QuantizedKVCache)
    assert (packed.packing.bits, packed.packing.group_size) == (4, 32)
    sliding = cache_maker(SCALED, CacheOptions(max_kv_size=50))()
    assert isinstance(sliding, SlidingKVCache)
    assert (sliding.max_size, sliding.keep) == (50, 4)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (SCALED, {"kv_bits": 5}, "4 or 8"),
        (SCALED, {"kv_bits": 4}, "head size of 32; it must be 32"),
        (SCALED, {"kv_bits": 4, "kv_group_size": 0}, "must be 32"),
        (UNEVEN, {"kv_bits": 4}, "head size of 16; leave out"),
        (SCALED, {"max_kv_size": 4}, "must be 5 or more"),
        (SCALED, {"max_kv_size": -1}, "must be 5 or more"),
        (SCALED, {"kv_bits": 4, "max_kv_size": 50}, "not both"),
    ],
)
def test_invalid_options_are_refused(config, options, message):
    with pytest.raises(OpenELMError, match=message):
        cache_maker(config, CacheOptions(**options))
