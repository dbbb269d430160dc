"""KL divergences from a teacher, whole and of its top tokens, against PyTorch."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm.model import divergence
from mlx_openelm.model.divergence import (
    DenseTargets,
    TopTargets,
    divergences,
    top_log_probabilities,
)

M, V, D, K = 150, 90, 16, 7
rng = np.random.default_rng(0)


def draw(*shape):
    return rng.standard_normal(shape, np.float32)


ROWS, HEAD = draw(M, D), draw(V, D)
TEACHER_ROWS, TEACHER_HEAD = draw(M, 24), draw(V - 6, 24)  # without padding rows
WEIGHTS = np.abs(draw(M)) + 0.1


def near(ours, theirs, limit=1e-4):
    theirs = theirs.detach().numpy()
    return np.abs(np.array(ours) - theirs).max() <= limit * np.abs(theirs).max()


def differentiate(targets, temperature):
    def loss(rows, head):
        losses = divergences(rows, head, targets, temperature=temperature)
        return (losses * mx.array(WEIGHTS)).sum()

    inputs = mx.array(ROWS), mx.array(HEAD)
    return mx.value_and_grad(loss, argnums=(0, 1))(*inputs)


def teacher_log_probs(temperature):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    logits = torch.from_numpy(TEACHER_ROWS @ TEACHER_HEAD.T) / temperature
    return logits.log_softmax(-1)


@pytest.fixture(params=[64, 512], ids=["chunks", "at once"], autouse=True)
def chunk(request, monkeypatch):
    monkeypatch.setattr(divergence, "training_logit_rows", lambda rows: request.param)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_whole_divergence_and_its_gradient(temperature):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    log_p = teacher_log_probs(temperature)
    rows, head = (torch.from_numpy(a).requires_grad_() for a in (ROWS, HEAD))
    log_q = (rows @ head.T / temperature).log_softmax(-1)
    theirs = (log_p.exp() * (log_p - log_q[:, : V - 6])).sum(-1)
    (theirs * torch.from_numpy(WEIGHTS)).sum().backward()
    targets = DenseTargets(mx.array(TEACHER_ROWS), mx.array(TEACHER_HEAD), temperature)
    value, (by_rows, by_head) = differentiate(targets, temperature)
    want = float((theirs.detach() * torch.from_numpy(WEIGHTS)).sum())
    assert value.item() == pytest.approx(want, rel=1e-4)
    assert near(by_rows, rows.grad)
    assert near(by_head, head.grad)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("count", [1, K, V - 6])
def test_the_divergence_of_top_tokens_and_its_gradient(temperature, count):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    log_p = teacher_log_probs(temperature)
    best = log_p.topk(count, dim=-1)
    rows, head = (torch.from_numpy(a).requires_grad_() for a in (ROWS, HEAD))
    log_q = (rows @ head.T / temperature).log_softmax(-1)
    known = (best.values.exp() * (best.values - log_q.gather(1, best.indices))).sum(-1)
    outside = torch.ones(M, V).scatter(1, best.indices, 0.0)
    rest_q = (log_q.exp() * outside).sum(-1)
    rest_p = (1 - best.values.exp().sum(-1)).clamp(min=1e-30)
    theirs = known + rest_p * (rest_p.log() - rest_q.log())
    (theirs * torch.from_numpy(WEIGHTS)).sum().backward()
    inputs = mx.array(TEACHER_ROWS), mx.array(TEACHER_HEAD)
    tokens, log_probs = top_log_probabilities(*inputs, count, temperature)
    value, (by_rows, by_head) = differentiate(
        TopTargets(tokens, log_probs), temperature
    )
    want = float((theirs.detach() * torch.from_numpy(WEIGHTS)).sum())
    assert value.item() == pytest.approx(want, rel=1e-4)
    assert near(by_rows, rows.grad)
    assert near(by_head, head.grad)


def test_top_tokens_give_a_lower_bound():
    inputs = mx.array(TEACHER_ROWS), mx.array(TEACHER_HEAD)
    rows, head = mx.array(ROWS), mx.array(HEAD)
    whole = np.array(divergences(rows, head, DenseTargets(*inputs), gradient=False))
    last = np.zeros(M)
    for count in (1, K, 40, V - 6):
        targets = TopTargets(*top_log_probabilities(*inputs, count))
        bound = np.array(divergences(rows, head, targets, gradient=False))
        assert (bound <= whole + 1e-5).all()
        assert (last <= bound + 1e-5).all()
        last = bound
    assert np.abs(last - whole).max() < 1e-4  # all tokens of the teacher


def test_top_tokens_are_the_most_likely_ones():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    inputs = mx.array(TEACHER_ROWS), mx.array(TEACHER_HEAD)
    tokens, log_probs = top_log_probabilities(*inputs, K, 2.0)
    best = teacher_log_probs(2.0).topk(K, dim=-1)
    order = torch.from_numpy(np.array(log_probs)).sort(descending=True)
    assert near(order.values.numpy(), best.values, 1e-5)
    theirs = torch.from_numpy(np.array(tokens).astype(np.int64)).gather(
        1, order.indices
    )
    assert (theirs == best.indices).all()
