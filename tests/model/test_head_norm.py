"""Norms of query and key heads, joined: always those that the module has now."""

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
    found = np.array(x, np.float64)
    found /= np.sqrt((found**2).mean(axis=-1, keepdims=True) + 1e-6)
    found[..., :Q, :] *= np.array(q_norm.weight)
    found[..., Q:, :] *= np.array(k_norm.weight)
    return found


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("cached", [False, True])
def test_each_head_has_the_weight_of_its_norm(norms, num_tokens, cached):
    x = heads(num_tokens)
    found = HeadNorm()(x, *norms, Q, cached=cached)
    np.testing.assert_allclose(found, expected(x, *norms), rtol=1e-5, atol=1e-6)


def test_decoding_sees_weights_that_were_replaced(norms):
    join, x = HeadNorm(), heads(1)
    join(x, *norms, Q, cached=True)
    norms[1].weight = mx.full((H,), 5.0)
    found = join(x, *norms, Q, cached=True)
    np.testing.assert_allclose(found, expected(x, *norms), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_tokens", "cached"), [(1, False), (5, True), (5, False)])
def test_all_but_decoding_sees_weights_changed_in_place(norms, num_tokens, cached):
    join, x = HeadNorm(), heads(num_tokens)
    join(x, *norms, Q, cached=cached)
    norms[0].weight[:] = 7.0
    found = join(x, *norms, Q, cached=cached)
    np.testing.assert_allclose(found, expected(x, *norms), rtol=1e-5, atol=1e-6)


def test_training_keeps_nothing_of_its_graph(norms):
    join = HeadNorm()
    norms[0].train()
    join(heads(5), *norms, Q, cached=False)
    assert join._joined is None
