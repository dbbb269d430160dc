"""Norms and RoPE of all heads in one operation, against MLX's fused operations."""

import re

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_openelm.model import joined_heads
from mlx_openelm.model.joined_heads import JoinedRotation

Q, K, H = 4, 2, 16
EPS = 1e-6


def random(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def make_norms(training=True):
    norms = nn.RMSNorm(H, eps=EPS), nn.RMSNorm(H, eps=EPS)
    for seed, norm in enumerate(norms):
        norm.weight = random(H, seed=seed)
        norm.train(training)
    return norms


def expected_heads(qkv, q_weight, k_weight, offset):
    q, k, v = (x.swapaxes(1, 2) for x in mx.split(qkv, [Q, Q + K], axis=2))
    rotated = [
        mx.fast.rope(
            mx.fast.rms_norm(x, weight, EPS),
            *(H,),
            traditional=False,
            base=10000.0,
            scale=1.0,
            offset=offset,
        )
        for x, weight in ((q, q_weight), (k, k_weight))
    ]
    return mx.concatenate([*rotated, v], axis=1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 7), (3, 1), (2, 5)])
def test_heads_are_those_of_mlxs_operations(batch, tokens, training):
    qkv, norms = random(batch, tokens, Q + 2 * K, H), make_norms(training)
    rotation = JoinedRotation.at(3 + mx.arange(tokens), H, 10000.0)
    heads = rotation(qkv, *norms, Q)
    expected = expected_heads(qkv, norms[0].weight, norms[1].weight, 3)
    assert mx.abs(heads.joined - expected).max() < 1e-5
    views = [heads.queries, heads.keys, heads.values]
    assert mx.array_equal(mx.concatenate(views, axis=1), heads.joined)
    assert mx.array_equal(heads.pair, mx.stack([heads.keys, heads.values]))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("norm_dtype", [None, mx.float32])
@pytest.mark.parametrize("training", [False, True])
def test_16_bits_are_as_exact_as_mlxs_operations(dtype, norm_dtype, training):
    exact, norms = random(2, 5, Q + 2 * K, H), make_norms(training)
    for norm in norms:
        norm.weight = norm.weight.astype(dtype).astype(norm_dtype or dtype)
    qkv, offset = exact.astype(dtype), 2001  # not a number in 16 bits
    rotation = JoinedRotation.at(offset + mx.arange(5), H, 10000.0)
    joined = rotation(qkv, *norms, Q).joined
    assert joined.dtype == dtype
    weights = [norm.weight for norm in norms]
    wide = [x.astype(mx.float32) for x in (qkv, *weights)]
    narrow = [x.astype(dtype) for x in (qkv, *weights)]
    expected = expected_heads(*wide, offset)
    own, theirs = (
        mx.linalg.norm(x.astype(mx.float32) - expected)
        for x in (joined, expected_heads(*narrow, offset))
    )
    assert own < 1.2 * theirs


def test_each_sequence_has_its_own_positions():
    qkv, norms, offsets = random(2, 1, Q + 2 * K, H), make_norms(), mx.array([3, 11])
    heads = JoinedRotation.at(offsets[:, None], H, 10000.0)(qkv, *norms, Q)
    weights = norms[0].weight, norms[1].weight
    assert mx.abs(heads.joined - expected_heads(qkv, *weights, offsets)).max() < 1e-5


def test_gradients_are_those_of_mlxs_operations():
    q_norm, k_norm = make_norms()
    arguments = random(2, 5, Q + 2 * K, H), q_norm.weight, k_norm.weight
    rotation = JoinedRotation.at(3 + mx.arange(5), H, 10000.0)

    def ours(qkv, q_weight, k_weight):
        q_norm.weight, k_norm.weight = q_weight, k_weight
        return mx.sin(rotation(qkv, q_norm, k_norm, Q).joined).sum()

    def theirs(*arguments):
        return mx.sin(expected_heads(*arguments, 3)).sum()

    own, expected = (mx.grad(f, (0, 1, 2))(*arguments) for f in (ours, theirs))
    for gradient, other in zip(own, expected, strict=True):
        assert mx.abs(gradient - other).max() < 1e-5 * mx.abs(other).max()


def test_the_operation_is_compiled_to_one_primitive(tmp_path, monkeypatch):
    qkv, norms = random(1, 1, Q + 2 * K, H), make_norms(training=False)
    elements, graph = [], tmp_path / "graph.dot"
    original = joined_heads._rotate_elements

    def collect(*arrays):
        mx.eval(arrays)
        elements.append(original(*arrays))
        return elements[0]

    monkeypatch.setattr(joined_heads, "_rotate_elements", collect)
    mx.enable_compile()  # the graph is not evaluated, so no compiler is called
    try:
        JoinedRotation.at(mx.array([3]), H, 10000.0)(qkv, *norms, Q)
    finally:
        mx.disable_compile()
    mx.export_to_dot(str(graph), elements[0])
    (name,) = re.findall(r'label ="([A-Za-z]+)', graph.read_text())
    assert name.startswith("Compiled")
