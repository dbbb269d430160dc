"""Losses and gradients as training computes them."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from models import UNEVEN, build
from trainings import (
    make_model,
    make_pairs,
    make_recipe,
    make_samples,
    make_training,
    step,
)

from mlx_openelm.finetuning.batches import collate
from mlx_openelm.finetuning.losses import (
    batch_losses,
    preference_losses,
    preference_margins,
    sequence_likelihoods,
)
from mlx_openelm.finetuning.trainable import use_dropout
from mlx_openelm.model import likelihood
from mlx_openelm.model.chunk_sizes import QUERIES
from mlx_openelm.model.kernels import attend, swiglu
from mlx_openelm.model.likelihood import token_losses
from mlx_openelm.model.lora import DoRALinear, LoRALinear
from mlx_openelm.model.token_layout import Sequences

DEEP = replace(
    UNEVEN,
    **{
        name: 4 * getattr(UNEVEN, name)
        for name in ("num_query_heads", "num_kv_heads", "ffn_dims")
    },
)


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32))


def assert_near(actual, expected, limit=1e-5):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        size = mx.maximum(mx.abs(theirs).max(), 0.1)
        assert mx.abs(ours - theirs).max() <= limit * size


# The loss ------------------------------------------------------------------------


def plain_losses(rows, head, targets, z_loss):
    logits = rows @ head.T
    log_total = mx.logsumexp(logits, axis=-1)
    return nn.losses.cross_entropy(logits, targets) + z_loss * log_total**2


@pytest.mark.parametrize("M", [1, 106, 107, 250])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_losses_and_gradients_are_those_of_cross_entropy(monkeypatch, M, z_loss):
    monkeypatch.setattr(likelihood, "training_logit_rows", lambda vocab_size: 106)
    rows, head = normal(M, 24), normal(300, 24, seed=1)
    targets = mx.array(np.random.default_rng(2).integers(0, 300, M))
    weights = normal(M, seed=3)

    def ours(rows, head):
        return (token_losses(rows, head, targets, z_loss=z_loss) * weights).sum()

    def theirs(rows, head):
        return (plain_losses(rows, head, targets, z_loss) * weights).sum()

    losses = token_losses(rows, head, targets, z_loss=z_loss)
    expected = plain_losses(rows, head, targets, z_loss)
    assert_near([losses], [expected])
    without = token_losses(rows, head, targets, z_loss=z_loss, gradient=False)
    assert_near([without], [expected])
    assert_near(
        mx.grad(ours, argnums=(0, 1))(rows, head),
        mx.grad(theirs, argnums=(0, 1))(rows, head),
    )
    # With a head that is not trained
    assert_near([mx.grad(ours)(rows, head)], [mx.grad(theirs)(rows, head)])


def test_losses_of_large_logits_are_finite():
    rows, head = 100 * normal(8, 24), 10 * normal(300, 24, seed=1)
    targets = mx.arange(8)

    def ours(rows):
        return token_losses(rows, head, targets).sum()

    def theirs(rows):
        return plain_losses(rows, head, targets, 0.0).sum()

    assert_near(
        [ours(rows), mx.grad(ours)(rows)], [theirs(rows), mx.grad(theirs)(rows)]
    )


@pytest.mark.parametrize(
    ("M", "share"),
    [(1024, 0.8), pytest.param(4096, 0.25, marks=pytest.mark.proof)],
)
def test_the_full_logits_are_never_stored(M, share):
    V = 32000
    rows, head = normal(M, 16), normal(V, 16, seed=1)
    targets = mx.arange(M)
    mx.eval(rows, head, targets)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loss, gradient = mx.value_and_grad(
        lambda rows: token_losses(rows, head, targets).sum()
    )(rows)
    mx.eval(loss, gradient)
    assert mx.get_peak_memory() - before < share * (M * V * 4)


# Sequences in one row ------------------------------------------------------------


def test_a_batch_of_sequences_gives_each_its_own_losses():
    model, samples = build(UNEVEN), make_samples()
    batch = collate(samples)
    together = np.array(batch_losses(model, batch))
    likelihoods = np.array(sequence_likelihoods(model, batch))
    for i, sample in enumerate(samples):
        tokens = mx.array(sample.tokens)[None]
        losses = nn.losses.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
        alone = np.array(losses)[sample.loss_mask[1:]]
        np.testing.assert_allclose(together[batch.sequence == i], alone, atol=1e-5)
        assert likelihoods[i] == pytest.approx(-alone.sum(), rel=1e-5)


def test_packed_sequences_do_not_attend_to_each_other():
    model, lengths = build(UNEVEN), (5, 1, 30, 12)
    rng = np.random.default_rng(4)
    parts = [rng.integers(3, 300, length) for length in lengths]

    def logits(parts):
        row = mx.array(np.concatenate(parts))[None]
        hidden = model.transformer(row, layout=Sequences(tuple(map(len, parts))))
        return np.split(np.array(model.head(hidden)[0]), np.cumsum(lengths)[:-1])

    packed = logits(parts)
    for part, own in zip(parts, packed, strict=True):
        alone = np.array(model(mx.array(part)[None])[0])
        np.testing.assert_allclose(own, alone, atol=1e-5 * np.abs(alone).max())
    changed = logits([parts[0], parts[1], (parts[2] + 7) % 300, parts[3]])
    for i in (0, 1, 3):
        assert np.array_equal(changed[i], packed[i])
    assert not np.allclose(changed[2], packed[2])


# Kernels -------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 100, QUERIES, QUERIES + 1, 2 * QUERIES + 60])
@pytest.mark.parametrize("before", [0, 37])
@pytest.mark.parametrize(("Q", "K"), [(4, 2), (3, 3), (3, 1)])
def test_attention_and_its_gradients_are_those_of_mlx(T, before, Q, K):
    H, S = 16, T + before
    inputs = normal(2, Q, T, H), normal(2, K, S, H, seed=1), normal(2, K, S, H, seed=2)
    weights = normal(2, Q, T, H, seed=3)
    mask = mx.arange(S) <= mx.arange(before, S)[:, None]

    def plain(q, k, v):
        k, v = mx.repeat(k, Q // K, axis=1), mx.repeat(v, Q // K, axis=1)
        scores = mx.where(mask, q @ k.swapaxes(-1, -2) * H**-0.5, -mx.inf)
        return mx.softmax(scores, axis=-1) @ v

    expected = plain(*inputs)
    fused = mx.fast.scaled_dot_product_attention(*inputs, scale=H**-0.5, mask=mask)
    ours = attend(*inputs, "causal")
    assert_near([ours, fused], [expected, expected])
    assert_near(
        mx.grad(lambda *a: (attend(*a, "causal") * weights).sum(), (0, 1, 2))(*inputs),
        mx.grad(lambda *a: (plain(*a) * weights).sum(), (0, 1, 2))(*inputs),
    )


@pytest.mark.parametrize("T", [1, 2, 50])
def test_swiglu_and_its_gradients_are_those_of_mlx(T):
    gate, up = 4 * normal(2, T, 33), normal(2, T, 33, seed=1)
    gate[0, 0, :4] = mx.array([-300.0, 300.0, 0.0, -88.0])
    weights = normal(2, T, 33, seed=2)

    def ours(gate, up):
        return (swiglu(gate, up) * weights).sum()

    def theirs(gate, up):
        return (nn.silu(gate) * up * weights).sum()

    assert_near([swiglu(gate, up)], [nn.silu(gate) * up])
    assert_near(mx.grad(ours, (0, 1))(gate, up), mx.grad(theirs, (0, 1))(gate, up))


# Checkpointing and dropout -------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_computes_the_same(method, dropout):
    gradients = {}
    for checkpointed in (False, True):
        recipe = make_recipe(
            fine_tune_type=method, dropout=dropout, grad_checkpoint=checkpointed
        )
        training = make_training(recipe, make_samples())
        gradients[checkpointed] = [step(training), step(training)]
        assert training.model.transformer.checkpointed == checkpointed
    for plain, again in zip(gradients[False], gradients[True], strict=True):
        for name in plain:
            assert np.array_equal(plain[name], again[name]), name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpointing_takes_less_memory(method):
    peaks = []
    for checkpointed in (False, True):
        recipe = make_recipe(
            fine_tune_type=method,
            grad_checkpoint=checkpointed,
            batch_size=20,
            grad_accumulation_steps=1,
        )
        model = make_model(recipe, DEEP)
        training = make_training(recipe, make_samples((60,) * 20), model)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        step(training)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.6 * peaks[0]


def test_dropout_differs_between_steps_and_is_reproducible():
    def make(dropout, seed=0):
        recipe = make_recipe(
            dropout=dropout,
            seed=seed,
            learning_rate=0.0,
            batch_size=1,
            grad_accumulation_steps=1,
        )
        # The same sample in both steps, so that only dropout differs
        training = make_training(recipe, make_samples((20,)))
        return [step(training), step(training)]

    def differ(one, other):
        return [n for n in one if np.abs(one[n] - other[n]).max() > 1e-3 * one[n].std()]

    plain, dropped, again, other = make(0.0), make(0.3), make(0.3), make(0.3, seed=1)
    assert differ(plain[0], plain[1]) == []
    assert len(differ(dropped[0], plain[0])) == len(plain[0])
    assert len(differ(dropped[0], dropped[1])) == len(plain[0])
    assert len(differ(dropped[0], other[0])) == len(plain[0])
    for i in (0, 1):
        assert all(np.array_equal(dropped[i][n], again[i][n]) for n in plain[i])


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_changes_nothing_on_average(method):
    layer, x = make_layer(method, dropout=0.3), normal(4, 24, seed=5)
    plain = layer(x)
    drawn = []
    for key in mx.random.split(mx.random.key(3), 2000):
        layer.use_key(key)
        drawn.append(layer(x))
    drawn = mx.stack(drawn)
    error = mx.abs(drawn.mean(axis=0) - plain)
    spread = mx.sqrt(drawn.var(axis=0) / len(drawn))
    assert (spread > 0).all()
    assert (error < 5 * spread).all()
    layer.use_key(None)
    assert mx.array_equal(layer(x), plain)


def test_dropout_is_applied_to_the_input_of_the_adapter_only():
    """As in the papers, and for DoRA as in Apple's training code."""
    x, kept = normal(4, 24, seed=5), None
    for method in ("lora", "dora"):
        layer, key = make_layer(method, dropout=0.3), mx.random.key(8)
        kept = mx.random.bernoulli(0.7, x.shape, key)
        seen = mx.where(kept, x / 0.7, 0)
        base = layer.linear.weight
        update = 1.5 * (layer.lora_a @ layer.lora_b).T
        expected = x @ base.T + seen @ update.T
        if method == "dora":
            factor = layer.m / mx.linalg.norm(base + update, axis=1)
            expected = x @ base.T + (factor - 1) * (seen @ base.T)
            expected += factor * (seen @ update.T)
        layer.use_key(key)
        assert_near([layer(x)], [expected])


def make_layer(method, dropout):
    linear = nn.Linear(24, 16, bias=False)
    linear.weight = normal(16, 24)
    parts = normal(24, 3, seed=1), 0.3 * normal(3, 16, seed=2), 1.5
    if method == "lora":
        return LoRALinear(linear, *parts, dropout)
    return DoRALinear(linear, *parts, 5 + normal(16, seed=3), dropout)


def test_each_adapter_and_micro_batch_has_its_own_dropout():
    model, keys = make_model(make_recipe(dropout=0.5)), []
    for numbers in [(0, 1, 2), (0, 1, 3), (0, 2, 2), (1, 1, 2)]:
        use_dropout(model, *numbers)
        keys += [m._key for m in model.modules() if isinstance(m, LoRALinear)]
    assert len({tuple(np.array(key).tolist()) for key in keys}) == len(keys) == 4 * 12
    use_dropout(model)
    assert {m._key for m in model.modules() if isinstance(m, LoRALinear)} == {None}


# Preferences ---------------------------------------------------------------------


def test_preference_losses_are_those_of_the_papers():
    likelihoods = np.array([-3.0, -8.0, -5.0, -4.0])
    reference = np.array([-4.0, -7.0, -4.5, -6.0])
    margins = preference_margins(mx.array(likelihoods), mx.array(reference), beta=0.5)
    ratios = likelihoods - reference
    expected = 0.5 * (ratios[:2] - ratios[2:])
    np.testing.assert_allclose(margins, expected, atol=1e-6)
    sigmoid = -np.log(1 / (1 + np.exp(-expected)))
    np.testing.assert_allclose(preference_losses(margins, "sigmoid"), sigmoid, 1e-5)
    hinge = np.maximum(0, 1 - expected)
    np.testing.assert_allclose(preference_losses(margins, "hinge"), hinge, 1e-5)
    far = preference_losses(mx.array([-1000.0, 1000.0]), "sigmoid")
    np.testing.assert_allclose(far, [1000.0, 0.0])


def test_margins_are_zero_before_the_first_step_and_then_grow():
    recipe = make_recipe(objective="dpo", dpo_beta=0.2)
    training = make_training(recipe, make_pairs())
    step(training)
    progress = training.progress
    assert progress.window_tokens == 6
    assert progress.window_loss == pytest.approx(6 * np.log(2), rel=1e-5)
    assert progress.window_margin == pytest.approx(0, abs=1e-4)
    step(training)
    assert progress.window_margin > 0.01  # the same pairs again
    assert progress.window_wins >= 6
