from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import UNEVEN, build, read_golden

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from mlx_openelm.bench.selfcheck import made_weight
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.device import FORCED_PATH
from mlx_openelm.generation.cache import KVCache
from mlx_openelm.model import head_norm, openelm, token_layout
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.token_layout import Sequences
from mlx_openelm.tensor_names import to_folder

LIMIT = 1e-4


def golden_difference() -> float:
    metadata, shapes, tokens, positions, logits = read_golden("gpt-test")
    model = OpenELM(OpenELMConfig.from_shapes(shapes))
    seed = int(metadata["seed"])
    model.load_weights(
        [(to_folder(n), mx.array(made_weight(n, s, seed))) for n, s in shapes.items()]
    )
    ours = np.array(model(mx.array(tokens)))[:, positions]
    return float(np.abs(ours - logits).max())


@pytest.mark.parametrize("forced", [False, True])
def test_logits_of_gpt_test_match_apples(monkeypatch, forced):
    if forced:
        monkeypatch.setenv(FORCED_PATH, "1")
    assert golden_difference() <= LIMIT


def swap_queries_and_keys(monkeypatch):
    original = token_layout.attend

    def swapped(queries, keys, values, mask):
        groups = queries.shape[1] // keys.shape[1]
        keys, values = (mx.repeat(x, groups, axis=1) for x in (keys, values))
        return original(keys, queries, values, mask)

    monkeypatch.setattr(token_layout, "attend", swapped)


def drop_the_qk_norm(monkeypatch):
    original = head_norm.normalize

    def only_wide(x, weight, eps):
        return x if weight.ndim == 2 else original(x, weight, eps)

    monkeypatch.setattr(head_norm, "normalize", only_wide)


def interleave_rope(monkeypatch):
    def interleaved(offset, num_tokens, H, base, dtype):
        rope = nn.RoPE(H, traditional=True, base=base)
        return lambda x: rope(x.swapaxes(1, 2), offset=offset)

    monkeypatch.setattr(token_layout, "rotation_after", interleaved)


def skip_rope(monkeypatch):
    skipped = lambda *args: lambda x: x.swapaxes(1, 2)  # noqa: E731
    monkeypatch.setattr(token_layout, "rotation_after", skipped)


def swap_gate_and_up(monkeypatch):
    original = openelm.swiglu
    monkeypatch.setattr(openelm, "swiglu", lambda gate, up: original(up, gate))


@pytest.mark.parametrize(
    "mutation",
    [
        swap_queries_and_keys,
        drop_the_qk_norm,
        interleave_rope,
        skip_rope,
        swap_gate_and_up,
    ],
)
def test_logits_of_a_wrong_model_differ_from_apples(monkeypatch, mutation):
    mutation(monkeypatch)
    assert golden_difference() > 100 * LIMIT


model = build(UNEVEN)
sequences = st.lists(st.integers(0, UNEVEN.vocab_size - 1), min_size=1, max_size=40)


@settings(max_examples=40)
@given(sequences, st.data())
def test_any_split_through_the_cache_gives_the_uncached_logits(tokens, data):
    whole = np.array(model(mx.array([tokens])))
    cache = [KVCache() for _ in model.layers]
    parts, start = [], 0
    while start < len(tokens):
        end = data.draw(st.integers(start + 1, len(tokens)))
        parts.append(np.array(model(mx.array([tokens[start:end]]), cache)))
        start = end
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)


def test_growing_and_trimming_the_cache_does_not_change_logits(monkeypatch):
    monkeypatch.setattr(KVCache, "step", 3)
    tokens = list(range(30))
    whole = np.array(model(mx.array([tokens])))
    cache = [KVCache() for _ in model.layers]
    model(mx.array([tokens[:10]]), cache)
    model(mx.array([[7, 7, 7]]), cache)  # rejected tokens, trimmed again
    for layer in cache:
        layer.trim(3)
    rest = np.array(model(mx.array([tokens[10:]]), cache))
    np.testing.assert_allclose(rest, whole[:, 10:], atol=2e-5)
    assert cache[0].offset == 30


def test_sequences_of_a_batch_do_not_affect_each_other():
    a, b = list(range(20)), list(range(100, 120))
    both = np.array(model(mx.array([a, b])))
    np.testing.assert_allclose(both[1:], np.array(model(mx.array([b]))), atol=2e-5)


def test_later_tokens_do_not_change_earlier_logits():
    a, b = [1, 5, 9, 2], [1, 5, 9, 200]
    first, second = np.array(model(mx.array([a]))), np.array(model(mx.array([b])))
    np.testing.assert_allclose(first[:, :3], second[:, :3], atol=1e-6)
    assert np.abs(first[:, 3] - second[:, 3]).max() > 1e-2


def test_an_untied_head_uses_its_own_weight():
    untied = build(replace(UNEVEN, share_input_output_layers=False))
    tokens = mx.array([[1, 2, 3]])
    assert untied(tokens).shape == (1, 3, UNEVEN.vocab_size)
    hidden = untied.transformer(tokens)
    assert mx.allclose(untied.head(hidden), hidden @ untied.lm_head.weight.T, atol=1e-5)
    assert not mx.allclose(untied(tokens), model(tokens), atol=1e-2)


@pytest.mark.interop
def test_mlx_lms_caches_are_accepted():
    from mlx_lm.models.cache import KVCache as MlxLmKVCache
    from mlx_lm.models.cache import RotatingKVCache

    tokens = list(range(24))
    whole = np.array(model(mx.array([tokens])))
    for make in (MlxLmKVCache, lambda: RotatingKVCache(max_size=64)):
        cache = [make() for _ in model.layers]
        parts = [
            np.array(model(mx.array([tokens[a:b]]), cache))
            for a, b in ((0, 9), (9, 10), (10, 24))
        ]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_changed_norm_weights_take_effect(in_place):
    changed = build(UNEVEN)
    tokens = mx.array([[1, 2, 3]])
    before = np.array(changed(tokens))
    norm = changed.layers[0].attn.k_norm
    if in_place:
        norm.weight[:] = norm.weight * 2
    else:
        norm.weight = norm.weight * 2
    assert np.abs(np.array(changed(tokens)) - before).max() > 1e-3


@pytest.mark.parametrize("lengths", [(5, 7), (40, 60)])
def test_sequences_are_trained_in_the_dtype_of_the_model(lengths):
    half = build(UNEVEN)
    half.set_dtype(mx.bfloat16)
    tokens = mx.arange(sum(lengths))[None]

    def loss(weight):
        half.layers[0].attn.qkv_proj.weight = weight
        return half.transformer(tokens, layout=Sequences(lengths)).sum()

    weight = half.layers[0].attn.qkv_proj.weight
    assert half.transformer(tokens, layout=Sequences(lengths)).dtype == mx.bfloat16
    assert mx.grad(loss)(weight).dtype == mx.bfloat16


@pytest.mark.parametrize("rows", [2, 200])  # small tensors use another kernel
def test_normalize_matches_the_formula(rows):
    x = np.random.default_rng(0).standard_normal((1, rows, 6, 64), np.float32)
    for shape in ((64,), (6, 64)):
        weight = np.random.default_rng(1).standard_normal(shape, np.float32)
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight
        normed = openelm.normalize(mx.array(x), mx.array(weight), 1e-6)
        np.testing.assert_allclose(np.array(normed), expected, atol=1e-5)
