"""KL divergence by blocks of the vocabulary: exact, and small in memory."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_openelm.model import head_divergence
from mlx_openelm.model.head_divergence import (
    Outputs,
    PlainHead,
    compare,
    total_divergence,
)
from mlx_openelm.model.learned_scales import LearnedEmbedding
from mlx_openelm.model.packed_weights import pack_weight
from mlx_openelm.model.quantization import Packing


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def plain_head(weight):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = weight
    return PlainHead(module)


def packed_head(weight):
    packing = Packing(4, 32)
    return LearnedEmbedding(packing, pack_weight(packing, weight), mx.float32)


def log_softmax(rows, weight):
    logits = np.array(rows, np.float64) @ np.array(weight, np.float64).T
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("block", [7, 100, 1000])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_divergence_and_first_choice_are_those_of_float64(monkeypatch, block, spread):
    monkeypatch.setattr(head_divergence, "BLOCK", block)
    rows, taught = normal(50, 32), normal(50, 32, seed=1)
    weight, other = spread * normal(300, 32, seed=2), spread * normal(300, 32, seed=3)
    found = compare(
        Outputs(rows, plain_head(weight)), Outputs(taught, plain_head(other))
    )
    log_p, log_q = log_softmax(taught, other), log_softmax(rows, weight)
    want = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    assert np.allclose(np.array(found.divergence), want, rtol=1e-5, atol=2e-5)
    assert (
        np.array(found.agrees).tolist()
        == (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
    )
    same = compare(Outputs(rows, plain_head(weight)), Outputs(rows, plain_head(weight)))
    assert same.agrees.all()
    assert np.abs(np.array(same.divergence)).max() < 2e-5


def test_a_small_divergence_is_exact(monkeypatch):
    monkeypatch.setattr(head_divergence, "BLOCK", 1000)
    taught, weight = normal(200, 64), 0.3 * normal(8000, 64, seed=2)
    rows, head = taught + 1e-3 * normal(200, 64, seed=1), plain_head(weight)
    found = compare(Outputs(rows, head), Outputs(taught, head))
    log_p, log_q = log_softmax(taught, weight), log_softmax(rows, weight)
    want = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    assert np.array(found.divergence, np.float64).mean() == pytest.approx(
        want, abs=3e-8
    )


def test_equal_logits_in_two_blocks_have_the_first_token_as_choice(monkeypatch):
    monkeypatch.setattr(head_divergence, "BLOCK", 2)
    tied = plain_head(mx.array([[0.0], [0.0], [1.0], [0.0], [1.0]]))
    clear = plain_head(mx.array([[0.0], [0.0], [1.0], [0.0], [0.0]]))
    one = mx.ones((1, 1))
    assert compare(Outputs(one, tied), Outputs(one, clear)).agrees.item()


def test_neither_the_head_nor_the_logits_exist_as_a_whole():
    M, V, D = 256, 64 * 1024, 128
    student = Outputs(normal(M, D), packed_head(0.1 * normal(V, D, seed=1)))
    teacher = Outputs(normal(M, D, seed=2), plain_head(0.1 * normal(V, D, seed=3)))
    student.head.freeze()
    student.head.unfreeze(keys=["a", "c"])

    def loss(head):
        return total_divergence(Outputs(student.rows, head), teacher)

    compute = nn.value_and_grad(student.head, loss)
    mx.eval(student, teacher.rows, student.head.parameters())
    teacher.head.unpack(slice(0, V), []).sum().item()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    value, gradients = compute(student.head)
    mx.eval(value, gradients)
    used = mx.get_peak_memory() - before
    assert used < 2.5 * V * D * 4  # the head; float32 logits alone would be twice it
