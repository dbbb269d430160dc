"""Joined norms of query and key heads use the module's current weights."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_openelm.model.head_norm import HeadNorm

Q, K, H = 4, 2, 8


@pytest.fixture
def norms() -> tuple[nn.RMSNorm, nn.RMSNorm]:
    q_norm, k_norm = nn.RMSNorm(H, eps=1e-6), nn.RMSNorm(H, eps=1e-6)
    q_norm.weight, k_norm.weight = mx.full((H,), 2.0), mx.full((H,), 3.0)
    q_norm.eval()
    return q_norm, k_norm


def heads(num_tokens: int) -> mx.array:
    return mx.random.normal((1, num_tokens, Q + K, H), key=mx.random.key(0))


def expected(x: mx.array, q_norm: nn.RMSNorm, k_norm: nn.RMSNorm) -> np.ndarray:
    normed = np.array(x, np.float64)
    normed /= np.sqrt((normed**2).mean(axis=-1, keepdims=True) + 1e-6)
    normed[..., :Q, :] *= np.array(q_norm.weight)
    normed[..., Q:, :] *= np.array(k_norm.weight)
    return normed


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("cached", [False, True])
def test_each_head_has_the_weight_of_its_norm(norms, num_tokens, cached):
    x = heads(num_tokens)
    normed = HeadNorm()(x, *norms, Q, cached=cached)
    np.testing.assert_allclose(normed, expected(x, *norms), rtol=1e-5, atol=1e-6)


def test_decoding_uses_a_replaced_weight(norms):
    head_norm, x = HeadNorm(), heads(1)
    head_norm(x, *norms, Q, cached=True)
    norms[1].weight = mx.full((H,), 5.0)
    normed = head_norm(x, *norms, Q, cached=True)
    np.testing.assert_allclose(normed, expected(x, *norms), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_tokens", "cached"), [(1, False), (5, True), (5, False)])
def test_all_but_decoding_uses_weights_changed_in_place(norms, num_tokens, cached):
    head_norm, x = HeadNorm(), heads(num_tokens)
    head_norm(x, *norms, Q, cached=cached)
    norms[0].weight[:] = 7.0
    normed = head_norm(x, *norms, Q, cached=cached)
    np.testing.assert_allclose(normed, expected(x, *norms), rtol=1e-5, atol=1e-6)


def test_training_does_not_cache_joined_weights(norms):
    head_norm = HeadNorm()
    norms[0].train()
    head_norm(heads(5), *norms, Q, cached=False)
    assert head_norm._joined is None
