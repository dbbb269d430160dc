"""Quantization-aware adapters: fuse copies packed layers, and names other bits."""

import json

import mlx.core as mx
import pytest
from commands import make_source
from mlx.utils import tree_flatten
from models import EVEN

from converters.conversion.fusing import FusionProof, fuse
from converters.conversion.run import convert
from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.preparation import make_trainable
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.run import finetune
from mlx_openelm.storage.loading import load_model, stored_dtype
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.tensor_names import to_module


@pytest.mark.parametrize("base_bits", [3, 4])
def test_layers_without_adapter_have_the_weights_of_the_fused_model(
    tmp_path, monkeypatch, base_bits
):
    """Of the same bits, the base's are copied; of others, they are rounded again."""
    make_source(tmp_path / "source", config=EVEN)
    convert(tmp_path / "source", tmp_path / "base", bits=base_bits, receipt=False)
    record = {"prompt": "the king", "completion": " said!"}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(record)}\n" * 4)
    recipe = FinetuneRecipe(
        data=str(tmp_path / "train.jsonl"), model=str(tmp_path / "base"),
        adapter_path=str(tmp_path / "tuned"), iters=1, keys=("attn.qkv_proj",),
        num_layers=2, quantize_aware=3,
    )  # fmt: skip
    finetune(recipe)
    monkeypatch.setattr(FusionProof, "lost", False)
    fuse(tmp_path / "tuned", tmp_path / "fused", bits=3)
    folder = open_folder(tmp_path / "base")
    model = load_model(folder, mx.float32)
    make_trainable(model, recipe, stored_dtype(folder), folder.packings)
    fused = dict(
        tree_flatten(
            load_model(open_folder(tmp_path / "fused"), mx.float32).parameters()
        )
    )
    modules, compared = dict(model.named_modules()), 0
    for name in folder.packings:
        module = modules[to_module(name)]
        if "lora_a" not in module:
            got, want = module.weight, fused[f"{to_module(name)}.weight"]
            assert mx.array_equal(got, want), name
            compared += 1
    assert compared == len(folder.packings) - 2


def train_for_three_bits(tmp_path):
    """Train the adapter "tuned" of "base"."""
    (tmp_path / "train.jsonl").write_text('{"text": "the king said"}\n' * 4)
    recipe = FinetuneRecipe(
        data=str(tmp_path / "train.jsonl"), model=str(tmp_path / "base"),
        adapter_path=str(tmp_path / "tuned"), iters=1, quantize_aware=3,
    )  # fmt: skip
    finetune(recipe)


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 3, "group_size": 32}])
@pytest.mark.parametrize("lost", [True, False])
def test_fuse_names_the_rounding_of_the_training(tmp_path, monkeypatch, options, lost):
    make_source(tmp_path / "base", config=EVEN)
    train_for_three_bits(tmp_path)
    monkeypatch.setattr(FusionProof, "lost", lost)
    if lost:
        with pytest.raises(OpenELMError, match="trained for `bits` 3 without `group_"):
            fuse(tmp_path / "tuned", tmp_path / "fused", **options)
    else:
        report = fuse(tmp_path / "tuned", tmp_path / "fused", **options)
        assert "with `bits` 3 without `group_size`" in " ".join(report.notes)


def test_the_packing_of_the_base_can_be_the_rounding_of_the_training(
    tmp_path, monkeypatch
):
    make_source(tmp_path / "source", config=EVEN)
    convert(tmp_path / "source", tmp_path / "base", bits=3, receipt=False)
    train_for_three_bits(tmp_path)
    monkeypatch.setattr(FusionProof, "lost", True)
    report = fuse(tmp_path / "tuned", tmp_path / "fused")  # in 3 bits, as the base
    assert report.bits == 3
    assert "quantize_aware" not in " ".join(report.notes)
