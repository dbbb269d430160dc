"""Adapters trained on the rounded weights: gradients, and what fuse makes of them."""

import dataclasses
import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from commands import call, expect_error, make_source
from models import EVEN, TEXT
from trainings import make_model, make_recipe, make_samples

from converters.conversion import fusing
from converters.conversion.fusing import FusionProof, fuse
from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.batches import collate
from mlx_openelm.finetuning.losses import batch_losses
from mlx_openelm.finetuning.preparation import prepare
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.refinements.quantization_aware import Rounding
from mlx_openelm.finetuning.run import finetune
from mlx_openelm.model.quantization import EMBED_BITS, Packing
from mlx_openelm.storage.loading import load_model
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.training.arrays import flatten


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = make_source(tmp_path_factory.mktemp("aware") / "base", config=EVEN)
    words = ["king", "gold", "wolf", "wood", "daughter", "eldest", "youngest", "said"]
    with (folder.parent / "train.jsonl").open("w") as opened:
        for i in range(40):
            prompt = " ".join(words[(i * k) % 8] for k in range(1, 4))
            record = {"prompt": prompt, "completion": words[i % 8] + "!"}
            opened.write(json.dumps(record) + "\n")
    return folder


def recipe_of(base, target, **changes):
    recipe = FinetuneRecipe(
        data=str(base.parent / "train.jsonl"), model=str(base),
        adapter_path=str(target), iters=40, batch_size=8, learning_rate=1e-2,
        rank=8, quantize_aware=3,
    )  # fmt: skip
    return dataclasses.replace(recipe, **changes)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpointed"])
def test_the_gradient_is_straight_through_as_in_pytorch(method, checkpoint):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from adapted_in_torch import in_torch

    recipe = make_recipe(
        fine_tune_type=method,
        quantize_aware=3,
        num_layers=2,
        grad_checkpoint=checkpoint,
    )
    model = make_model(recipe, EVEN)
    plain = make_model(dataclasses.replace(recipe, quantize_aware=None), EVEN)
    reference, trained = in_torch(plain, recipe.scale)

    def straight_through(layer, bits):
        rounding = Rounding(Packing(bits, 64), mx.bfloat16)

        class Round(torch.nn.Module):
            def forward(self, weight):
                rounded = np.array(rounding(mx.array(weight.detach().numpy())))
                return weight + (torch.from_numpy(rounded) - weight).detach()

        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Round())

    for layer in reference.modules():
        if isinstance(layer, torch.nn.Linear):
            straight_through(layer, 3)
        elif isinstance(layer, torch.nn.Embedding):
            straight_through(layer, EMBED_BITS)
    samples = make_samples()
    total = 0.0
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        places = np.flatnonzero(sample.loss_mask)
        logits = reference(tokens[None, :-1])[0, places - 1]
        total = total + torch.nn.functional.cross_entropy(
            logits, tokens[places], reduction="sum"
        )
    total.backward()
    value, gradient = nn.value_and_grad(
        model, lambda m: batch_losses(m, collate(samples)).sum()
    )(model)
    assert value.item() == pytest.approx(total.item(), rel=1e-4)
    flat = flatten(gradient)
    assert flat.keys() == trained.keys()
    for name, parameter in trained.items():
        want, got = parameter.grad.numpy(), np.array(flat[name])
        # A weight halfway between two integers can be rounded to either.
        assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max(), name


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_validation_loss_is_that_of_the_fused_model(base, tmp_path, method):
    recipe = recipe_of(base, tmp_path / "run", fine_tune_type=method, num_layers=2)
    report, valid = finetune(recipe), prepare(recipe).valid
    fused = fuse(tmp_path / "run", tmp_path / "fused", bits=3)
    model = load_model(open_folder(tmp_path / "fused"))
    loss = batch_losses(model, collate(valid), gradient=False).mean().item()
    assert report.last_loss < report.first_loss - 0.3
    assert loss == pytest.approx(report.last_loss, abs=0.02)
    assert not [note for note in fused.notes if "another version" in note]


def test_more_of_the_gain_is_kept(base, tmp_path, monkeypatch):
    losses = {}
    for bits in (None, 3):
        recipe = recipe_of(base, tmp_path / f"run-{bits}", quantize_aware=bits)
        finetune(recipe)
        target = tmp_path / f"fused-{bits}"
        monkeypatch.setattr(FusionProof, "lost", False)
        fuse(tmp_path / f"run-{bits}", target, bits=3)
        model = load_model(open_folder(target))
        batch = collate(prepare(recipe).train)
        losses[bits] = batch_losses(model, batch, gradient=False).mean().item()
    assert losses[3] < losses[None] - 0.01


def test_only_the_rounding_of_the_training_is_not_refused(base, tmp_path, monkeypatch):
    finetune(recipe_of(base, tmp_path / "run", iters=1))
    monkeypatch.setattr(FusionProof, "lost", True)
    assert fuse(tmp_path / "run", tmp_path / "fused", bits=3)
    for options in ({"bits": 3, "group_size": 32}, {"bits": 4}):
        with pytest.raises(OpenELMError, match="would lose the adapter"):
            fuse(tmp_path / "run", tmp_path / "other", **options)
    monkeypatch.setattr(fusing, "_kl", lambda p, q: p[:, 0] * math.nan)
    with pytest.raises(OpenELMError, match="would lose the adapter"):
        fuse(tmp_path / "run", tmp_path / "other", bits=3)


def test_fuse_does_not_learn_without_a_quantization(base, tmp_path):
    finetune(recipe_of(base, tmp_path / "run", iters=1))
    with pytest.raises(OpenELMError, match="`learn` trains a quantization; add `bits`"):
        fuse(tmp_path / "run", tmp_path / "fused", learn="2steps")


def test_fuse_shows_the_losses_and_learns(base, tmp_path):
    finetune(recipe_of(base, tmp_path / "run", quantize_aware=4))
    (tmp_path / "text.txt").write_text(TEXT)
    fuse_it = ("fuse", "--adapter-path", tmp_path / "run", "--save-path")
    result = call(*fuse_it, tmp_path / "fused", "--q-bits", "4", "--learn", "10steps")
    assert result.exit_code == 0, result.stderr
    assert "Loss on the sample: " in result.stderr
    assert "Learned for 10 steps: mean KL" in result.stderr
    metadata = open_folder(tmp_path / "fused").metadata
    proof, learned = metadata["fusion"], metadata["learned"]
    assert 0 < learned["mean_kl_after"] <= learned["mean_kl_before"]
    assert learned["steps"] == 10
    for name in ("fused", "adapter", "base"):
        assert f"{proof[f'loss_{name}']:.4f}" in result.stderr
    other = call(*fuse_it, tmp_path / "plain")
    assert "trained with --quantize-aware 4" in other.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantize-aware", "7"), "--quantize-aware is 7; MLX has 2, 3"),
        (("--quantize-aware", "4", "--fine-tune-type", "full"), "trains an adapter"),
        (("--quantize-aware", "4", "--dropout", "0.1"), "--dropout of the adapter"),
        (("--quantize-aware", "4"), "is not possible for this model: A group size"),
    ],
)
def test_what_cannot_be_rounded_is_refused(here, options, message):
    (here / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    expect_error(here, "lora", "--data", "train.jsonl", "--model", "model",
                 *options, message=message)  # fmt: skip
