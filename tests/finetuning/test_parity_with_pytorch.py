"""Training steps, compared with the same steps in PyTorch."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from models import UNEVEN
from trainings import (
    UNTIED,
    make_model,
    make_pairs,
    make_recipe,
    make_samples,
    make_training,
    step,
)

from mlx_openelm.device import FORCED_PATH, takes_gpu_path
from mlx_openelm.finetuning.samples import Pair, Sample
from mlx_openelm.training.arrays import trained_tensors

torch = pytest.importorskip("torch", reason="needs PyTorch")

from adapted_in_torch import in_torch  # noqa: E402

from converters.reference import summed_loss  # noqa: E402


@pytest.fixture(params=["cpu", "gpu"], autouse=True)
def path(request, monkeypatch):
    """The operations and updates for the CPU, or those for a GPU."""
    if request.param == "gpu":
        monkeypatch.setenv(FORCED_PATH, "1")


LIMIT = 1e-4  # max|a - b| / max|b| of each tensor
EMBEDDING = "transformer.token_embeddings"
EVERYWHERE = ("qkv_proj", "out_proj", "proj_1", "proj_2", EMBEDDING)


def padded(samples: Sequence[Sample]):
    """Return tokens and targets (B, T); targets are -100 where the mask is false."""
    T = max(len(s.tokens) for s in samples) - 1
    tokens = torch.zeros(len(samples), T, dtype=torch.long)
    targets = torch.full((len(samples), T), -100)
    for i, sample in enumerate(samples):
        read = torch.from_numpy(sample.tokens.astype(np.int64))
        tokens[i, : len(read) - 1] = read[:-1]
        labels = torch.where(torch.from_numpy(sample.loss_mask), read, -100)
        targets[i, : len(read) - 1] = labels[1:]
    return tokens, targets


def make_adamw(trained, recipe):
    vectors = [p for p in trained.values() if p.ndim == 1]
    matrices = [p for p in trained.values() if p.ndim > 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, eps=recipe.eps)


def ours_of(model):
    return {name: np.array(array) for name, array in trained_tensors(model).items()}


def theirs_of(trained):
    return {name: p.detach().numpy().copy() for name, p in trained.items()}


def largest(array):
    return np.abs(array).max()


def length(array):
    return np.linalg.norm(array.ravel())


def assert_close(ours, theirs, *, size=largest, limit=LIMIT):
    assert ours.keys() == theirs.keys()
    errors = {n: size(ours[n] - theirs[n]) / size(theirs[n]) for n in theirs}
    assert {n: e for n, e in errors.items() if not e <= limit} == {}


def minus(after, before):
    return {n: after[n] - before[n] for n in after}


def compare_steps(recipe, model, rates, samples, loss_of):
    """Make steps with both; loss, norm, gradients and weights must agree."""
    training = make_training(recipe, samples, model)
    reference, trained = in_torch(model, recipe.scale)
    optimizer = make_adamw(trained, recipe)
    start = theirs_of(trained)
    for i, rate in enumerate(rates):
        before = training.progress.window_loss, training.progress.window_tokens
        gradients = step(training)
        loss = training.progress.window_loss - before[0]
        count = training.progress.window_tokens - before[1]

        chosen = [samples[j] for j in training.order.batch(i)]
        total, expected_count = loss_of(reference, chosen)
        optimizer.zero_grad()
        (total / expected_count).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), recipe.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        assert norm > 1.2 * recipe.clip_norm, "clipping is not active"
        assert count == expected_count
        assert loss == pytest.approx(total.item(), rel=1e-4)
        assert training.norm == pytest.approx(norm.item(), rel=1e-4)
        assert_close(gradients, {n: p.grad.numpy() for n, p in trained.items()})
        optimizer.step()
        ours = ours_of(model)
        theirs = theirs_of(trained)
        # Adam normalises gradients, so rounding of tiny ones becomes a large update.
        assert_close(ours, theirs, limit=2 * LIMIT if takes_gpu_path() else LIMIT)
        moved, expected = minus(ours, start), minus(theirs, start)
        assert_close(moved, expected, size=length, limit=5e-3)
        start = ours


def token_loss(z_loss=0.0):
    def loss_of(reference, samples: Sequence[Sample]):
        tokens, targets = padded(samples)
        _, total = summed_loss(reference(tokens), targets, z_loss=z_loss)
        return total, sum(int(s.loss_mask.sum()) for s in samples)

    return loss_of


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"fine_tune_type": "lora"}, UNEVEN),
        ({"fine_tune_type": "dora"}, UNEVEN),
        ({"fine_tune_type": "full"}, UNEVEN),
        ({"fine_tune_type": "full"}, UNTIED),
        ({"fine_tune_type": "full", "num_layers": 2}, UNEVEN),
        ({"fine_tune_type": "lora", "keys": EVERYWHERE}, UNEVEN),
        ({"fine_tune_type": "lora", "keys": ("ffn.proj_1", EMBEDDING)}, UNTIED),
        ({"fine_tune_type": "lora", "keys": ("attn.out_proj", "lm_head")}, UNTIED),
        ({"fine_tune_type": "dora", "keys": ("attn.qkv_proj", "lm_head")}, UNTIED),
        ({"fine_tune_type": "lora", "rank": "auto:4", "num_layers": 2}, UNEVEN),
        ({"fine_tune_type": "dora", "grad_checkpoint": True}, UNEVEN),
        ({"fine_tune_type": "full", "z_loss": 1e-2}, UNEVEN),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_two_steps_agree_with_pytorch(options, config):
    recipe = make_recipe(weight_decay=0.1, **options)
    model = make_model(recipe, config)
    loss_of = token_loss(recipe.z_loss)
    compare_steps(recipe, model, [3e-4, 3e-4], make_samples(), loss_of)


def test_a_schedule_and_adams_state_agree_with_pytorch():
    recipe = make_recipe(
        warmup_steps=1, schedule="cosine", iters=3, weight_decay=0.1, betas=(0.8, 0.9)
    )
    final, peak = recipe.final_learning_rate, recipe.learning_rate
    halfway = final + (peak - final) * (1 + math.cos(math.pi / 2)) / 2
    rates = [peak / 2, peak, halfway]
    compare_steps(recipe, make_model(recipe), rates, make_samples(), token_loss())


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_preference_steps_agree_with_pytorch(method, kind):
    recipe = make_recipe(
        objective="dpo", fine_tune_type=method, dpo_loss=kind, dpo_beta=0.3, rank=3
    )
    model, pairs = make_model(recipe), make_pairs(12)
    start, _ = in_torch(model, recipe.scale)  # the reference: the initial model

    def log_ratios(policy, answers):
        tokens, targets = padded(answers)

        def likelihoods(model):
            logs = torch.log_softmax(model(tokens), dim=-1)
            picked = logs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            return (picked * (targets >= 0)).sum(-1)

        with torch.no_grad():
            reference = likelihoods(start)
        return likelihoods(policy) - reference

    def loss_of(policy, chosen: Sequence[Pair]):
        better = log_ratios(policy, [pair.chosen for pair in chosen])
        worse = log_ratios(policy, [pair.rejected for pair in chosen])
        margins = recipe.dpo_beta * (better - worse)
        if kind == "sigmoid":
            losses = -torch.nn.functional.logsigmoid(margins)
        else:
            losses = torch.relu(1 - margins)
        return losses.sum(), len(chosen)

    compare_steps(recipe, model, [3e-4, 3e-4], pairs, loss_of)


@pytest.mark.interop
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradients_agree_with_peft(method):
    peft = pytest.importorskip("peft", reason="needs PEFT")
    recipe = make_recipe(fine_tune_type=method, clip_norm=0.0)
    model, samples = make_model(recipe), make_samples()
    start = ours_of(model)
    training = make_training(recipe, samples, model)
    gradients = step(training)

    reference, _ = in_torch(make_model(make_recipe(fine_tune_type="full")), 1.0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=4 * recipe.scale,
        target_modules=["qkv_proj", "out_proj", "proj_1", "proj_2"],
        use_dora=method == "dora",
    )
    theirs = peft.inject_adapter_in_model(config, reference)
    in_peft = {
        "lora_a": "lora_A.default.weight",
        "lora_b": "lora_B.default.weight",
        "m": "lora_magnitude_vector.default.weight",
    }
    parameters = dict(theirs.named_parameters())
    trained = {}
    for name, array in start.items():
        path, _, leaf = name.removeprefix("transformer.").rpartition(".")
        trained[name] = parameters[f"{path}.{in_peft[leaf]}"]
        trained[name].data = torch.from_numpy(np.ascontiguousarray(array.T))
    chosen = [samples[j] for j in training.order.batch(0)]
    total, count = token_loss()(theirs, chosen)
    (total / count).backward()
    assert_close(gradients, {n: p.grad.numpy().T for n, p in trained.items()})
