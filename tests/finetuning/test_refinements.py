"""ORPO, rsLoRA, LoRA+ and NEFTune."""

import dataclasses
import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from commands import call, make_source
from mlx.utils import tree_map
from models import TEXT, UNEVEN, build
from trainings import make_model, make_pairs, make_recipe, make_samples, make_training

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.batches import collate
from mlx_openelm.finetuning.further_objectives.choice import make_objective
from mlx_openelm.finetuning.losses import target_rows
from mlx_openelm.finetuning.preparation import make_trainable
from mlx_openelm.finetuning.trainable import use_dropout
from mlx_openelm.model.lora import LoRALinear
from mlx_openelm.signals import Stop
from mlx_openelm.training.arrays import flatten, trained_tensors
from mlx_openelm.training.optimizer import make_optimizer

# ORPO ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_orpo_is_that_of_pytorch(method):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from adapted_in_torch import in_torch

    recipe = make_recipe(objective="orpo", fine_tune_type=method, orpo_weight=0.3)
    model, pairs, objective = make_model(recipe), make_pairs(), make_objective(recipe)
    reference, trained = in_torch(model, recipe.scale)

    def mean_log_p(sample):
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        places = np.flatnonzero(sample.loss_mask)
        logits = reference(tokens[None, :-1])[0, places - 1]
        return -torch.nn.functional.cross_entropy(logits, tokens[places])

    losses, ratios = [], []
    for pair in pairs:
        chosen, rejected = mean_log_p(pair.chosen), mean_log_p(pair.rejected)
        odds = [torch.log(p.exp() / (1 - p.exp())) for p in (chosen, rejected)]
        ratios.append(odds[0] - odds[1])
        losses.append(-chosen - 0.3 * torch.nn.functional.logsigmoid(ratios[-1]))
    total = torch.stack(losses).sum()
    total.backward()
    batch = objective.collate(pairs)
    (value, margins), gradient = nn.value_and_grad(
        model, lambda m: objective.loss(m, batch)
    )(model)
    totals = objective.totals(batch, value, margins)
    assert totals.loss == pytest.approx(total.item(), rel=1e-4)
    assert totals.count == len(pairs)
    assert totals.wins == sum(ratio.item() > 0 for ratio in ratios)
    assert totals.margin == pytest.approx(sum(r.item() for r in ratios), rel=1e-3)
    assert objective.evaluate(model, batch).loss == pytest.approx(totals.loss)
    for name, parameter in trained.items():
        want, got = parameter.grad.numpy(), np.array(flatten(gradient)[name])
        assert np.abs(got - want).max() <= 1e-4 * max(np.abs(want).max(), 1e-3), name


def test_orpo_prefers_the_chosen_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_source(tmp_path / "model")
    records = [
        {"prompt": s, "chosen": " gold!", "rejected": " wood."}
        for s in TEXT.split(" ")[:24]
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    result = call("lora", "--data", "pairs.jsonl", "--model", "model",
                  "--objective", "orpo", "--iters", "20", "--learning-rate", "3e-3",
                  "--batch-size", "8", "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["unit"] == "pair"
    assert report["last_loss"] < report["first_loss"] - 0.5


# rsLoRA --------------------------------------------------------------------------


def test_rslora_divides_alpha_by_the_root_of_the_rank(tmp_path, monkeypatch):
    recipe = make_recipe(rslora=True, rank=9, scale=2.0)  # alpha is 18
    model = build(UNEVEN)
    make_trainable(model, recipe)
    scales = {m.scale for m in model.modules() if isinstance(m, LoRALinear)}
    assert scales == {18 / math.sqrt(9)}
    make_source(tmp_path / "model")
    lines = [json.dumps({"text": str(i)}) for i in range(9)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    result = call("lora", "--data", "train.jsonl", "--model", "model", "--iters", "1",
                  "--rslora", "--rank", "4", "--scale", "3", "--quiet")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    config = json.loads((tmp_path / "adapters/train/adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == 6.0  # what mlx-lm multiplies by


@pytest.mark.parametrize("options", [{"rank": "auto:4"}, {"fine_tune_type": "full"}])
def test_rslora_needs_one_rank(options):
    with pytest.raises(OpenELMError, match="`rslora` depends on the rank"):
        make_recipe(rslora=True, **options)


# LoRA+ ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_plus_multiplies_the_rate_of_b(name, method):
    recipe = make_recipe(fine_tune_type=method)
    changes = []
    for ratio in (1.0, 4.0):
        model = make_model(recipe)
        before = trained_tensors(model)
        optimizer = make_optimizer(model, name, (0.9, 0.95), 1e-8, 0.1, b_ratio=ratio)
        optimizer.learning_rate = 1e-3
        gradients = model.trainable_parameters()
        optimizer.update(model, gradients)
        after = trained_tensors(model)
        changes.append({n: np.array(after[n] - before[n]) for n in before})
        assert optimizer.learning_rate.item() == pytest.approx(1e-3)
    for path, plain in changes[0].items():
        ratio = 4 if path.endswith("lora_b") else 1
        np.testing.assert_allclose(
            changes[1][path], ratio * plain, rtol=0.02, atol=1e-6
        )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lora_plus_leaves_an_embedding_its_rate(tied):
    config = dataclasses.replace(UNEVEN, share_input_output_layers=tied)
    model = make_model(make_recipe(adapt_embedding=True), config)
    before = trained_tensors(model)
    optimizer = make_optimizer(model, "sgd", (0.0, 0.0), 1e-8, 0.0, b_ratio=4.0)
    optimizer.learning_rate = 1e-3
    optimizer.update(model, tree_map(mx.ones_like, model.trainable_parameters()))
    after = trained_tensors(model)
    rates = {n: float((before[n] - after[n]).max()) for n in before}
    assert any(".token_embeddings." in name for name in rates)
    for name, rate in rates.items():
        fast = name.endswith("lora_b") and "token_embeddings" not in name
        assert rate == pytest.approx(4e-3 if fast else 1e-3, rel=0.01), name


def test_lora_plus_needs_an_adapter():
    with pytest.raises(OpenELMError, match="`lora_plus_ratio`"):
        make_recipe(lora_plus_ratio=16, fine_tune_type="full")


# NEFTune -------------------------------------------------------------------------


def test_noise_is_uniform_within_its_bound_and_in_training_only():
    recipe = make_recipe(neftune_noise=5.0)
    model, plain = make_model(recipe, perturb=False), build(UNEVEN)
    batch = collate(make_samples())
    assert (target_rows(model, batch) == target_rows(plain, batch)).all()
    embeddings = []
    model.transformer.layers.insert(0, lambda x, *_: embeddings.append(x) or x)
    plain.transformer.layers.insert(0, lambda x, *_: embeddings.append(x) or x)
    use_dropout(model, 0, 1, 0)
    for one in (model, model, plain):
        target_rows(one, batch)
    use_dropout(model, 0, 2, 0)
    target_rows(model, batch)
    first, again, without, other = (np.array(e)[0] for e in embeddings)
    assert (first == again).all()  # the same step has the same noise
    assert not (first == other).all()
    noise, start = first - without, 0
    for length in batch.lengths:
        bound = 5.0 / math.sqrt(length * UNEVEN.model_dim)
        part = np.abs(noise[start : start + length])
        assert 0.9 * bound < part.max() <= bound * 1.001
        start += length
    use_dropout(model)
    target_rows(model, batch)
    assert (np.array(embeddings[-1])[0] == without).all()


def test_noise_changes_training_and_resumes(tmp_path):
    losses = []
    for noise in (0.0, 5.0, 5.0):
        recipe = make_recipe(neftune_noise=noise)
        training = make_training(recipe, make_samples())
        losses.append([training.trainer.update(Stop()).totals.loss for _ in range(2)])
    assert losses[1] == losses[2]
    assert losses[0][0] != losses[1][0]


def test_negative_noise_is_refused():
    with pytest.raises(OpenELMError, match="`neftune_noise` is -1"):
        make_recipe(neftune_noise=-1.0)
