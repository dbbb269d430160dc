"""Estimates of a run, made without its text."""

import json
import subprocess
import sys
from dataclasses import replace
from math import ceil

import pytest
from commands import call, expect_error
from places import ROOT
from pretrainings import small_recipe

from converters.pretraining.corpus_files import expand_ranges
from converters.pretraining.plan import (
    PEAK_FLOPS,
    count_layer_bytes,
    find_peak_flops,
    plan_pretraining,
)
from converters.pretraining.recipe import PretrainRecipe
from mlx_openelm.config import CORENET_ROWS, OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.recipe_loader import load_recipe

SIZES = {  # name, learning rate, activation checkpointing, parallelism, as published
    "270m": ("270M", 5.3e-3, False, "ddp"),
    "450m": ("450M", 3.9e-3, True, "ddp"),
    "1_1b": ("1.1B", 2.4e-3, True, "ddp"),
    "3b": ("3B", 1.2e-3, True, "fsdp"),
}

CORPORA = [  # first file and number of files, as CoreNet's recipe expects them
    ("refinedweb-00000-of-05534.parquet", 5534),
    ("arxiv-00000-00099.jsonl", 100),
    ("book-00000-00001.jsonl", 1),
    ("github-00000-00098.jsonl", 98),
    ("stackexchange-00000-00001.jsonl", 1),
    ("wiki-00000-00001.jsonl", 1),
    ("c4-00000-01024.jsonl", 1024),
    ("pile-00000-of-01650.parquet", 1650),
    ("books-0000.json.gz", 3),
    ("pes2o_v2-0000.json.gz", 26),
    ("reddit-v5-dedupe-pii-nsfw-toxic-0000.json.gz", 78),
    ("stack-v4-train-0000.json.gz", 149),
    ("en_simple_wiki_v0-0000.json.gz", 2),
]


@pytest.mark.parametrize("name", SIZES)
def test_the_recipes_have_the_published_settings(name):
    size, rate, checkpointing, parallel = SIZES[name]
    recipe = load_recipe(PretrainRecipe, f"pretrain/openelm-{name}", {})
    optimizer = recipe.optimizer
    assert optimizer.learning_rate == rate
    assert optimizer.final_learning_rate == pytest.approx(rate / 10)
    assert (optimizer.warmup_steps, optimizer.warmup_learning_rate) == (5000, 1e-6)
    assert (optimizer.betas, optimizer.eps) == ((0.9, 0.95), 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 1.0)
    assert optimizer.z_loss == 1e-4
    assert (recipe.activation_checkpointing, recipe.parallel) == (
        checkpointing,
        parallel,
    )
    assert recipe.bf16
    # Weights at 50k, 100k, ... and 330k, 335k, ... 350k, the last five averaged.
    assert (recipe.save_every, recipe.keep_every) == (5000, 50_000)
    assert (recipe.keep_last, recipe.average_last) == (5, 5)
    plan = plan_pretraining(recipe)
    expected = OpenELMConfig.preset(size, vocab_size=CORENET_ROWS)
    assert plan.config == expected
    assert (plan.devices, plan.accumulation, plan.micro_batch_size) == (128, 1, 16)
    assert plan.tokens_per_step == 4_194_304
    assert plan.tokens == pytest.approx(1.468e12, rel=1e-3)
    assert len(plan.missing) == 1 + len(recipe.data.corpora) == 14
    data = recipe.data
    assert (data.mixture, data.readers, data.shuffle_block) == ("natural", 512, 1)
    assert recipe.readers % 128 == 0
    counts = [expand_ranges(c.files[0]) for c in data.corpora]
    assert [(names[0].split("/")[-1], len(names)) for names in counts] == CORPORA
    assert {c.text_key for c in data.corpora[1:]} == {"text"}
    assert data.corpora[0].text_key == "content"
    assert all(c.source and c.name and len(c.files) == 1 for c in data.corpora)


def test_fewer_devices_accumulate_and_shards_need_less_memory():
    recipe = load_recipe(PretrainRecipe, "pretrain/openelm-3b", {})
    plan = plan_pretraining(recipe, devices=8)
    assert (plan.accumulation, plan.tokens_per_step) == (16, 4_194_304)
    P = plan.config.num_parameters
    ddp, fsdp = plan.memory["ddp"], plan.memory["fsdp"]
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (4 * P, 4 * P, 8 * P)
    assert fsdp.weights == 4 * P // 8
    assert fsdp.total < ddp.total - 14 * P * 7 // 8 + fsdp.copies
    kept = replace(recipe, activation_checkpointing=False)
    memory = plan_pretraining(kept, devices=8).memory["fsdp"]
    assert memory.activations > 3 * fsdp.activations
    muon = replace(recipe, optimizer=replace(recipe.optimizer, name="muon"))
    assert plan_pretraining(muon).memory["ddp"].optimizer < 6 * P
    hours = plan.flops / (0.4 * 312e12) / 3600
    assert plan.a100_days == pytest.approx(hours / 24)


@pytest.mark.parametrize("bf16", [True, False])
def test_layer_bytes_equal_those_that_torch_saves(bf16):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from converters.reference import ReferenceOpenELM

    config = OpenELMConfig.scaled(
        num_layers=3,
        model_dim=128,
        head_dim=32,
        num_gqa_groups=2,
        ffn_dim_divisor=16,
        vocab_size=50,
    )
    model = ReferenceOpenELM(config)
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    positions = 4 * 64
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model.hidden(torch.zeros(4, 64, dtype=torch.long))
    saved = sum(size for size, _ in kept.values()) - (2 * matrices if bf16 else 0)
    expected = sum(count_layer_bytes(config, i, bf16=bf16) for i in range(3))
    assert saved / positions == pytest.approx(expected, rel=0.06)


def test_peak_flops_depend_on_the_devices_name():
    assert find_peak_flops("NVIDIA A100-SXM4-80GB") == PEAK_FLOPS["A100"]
    assert find_peak_flops("NVIDIA H100 PCIe") == 756e12
    assert find_peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert find_peak_flops("NVIDIA L40S") == 362e12
    assert find_peak_flops("NVIDIA L4") == 121e12
    assert find_peak_flops("TITAN V") is None


def test_a_batch_size_that_does_not_divide_is_refused(tmp_path):
    recipe = replace(small_recipe(tmp_path), batch_size=12)
    with pytest.raises(OpenELMError, match=r"12; it must be a multiple of .* \(5\)"):
        plan_pretraining(recipe, devices=5)
    odd = replace(recipe, micro_batch_size=4)
    with pytest.raises(
        OpenELMError, match="micro_batch_size is 4; it must divide the 6"
    ):
        plan_pretraining(odd, devices=2)
    assert plan_pretraining(odd, devices=1).accumulation == ceil(12 / 4)
    streamed = replace(odd.data, packing=False, readers=6)
    odd = replace(odd, data=streamed, micro_batch_size=1)
    with pytest.raises(OpenELMError, match=r"readers is 6; .* multiple of .* \(4\)"):
        plan_pretraining(odd, devices=4)
    assert plan_pretraining(odd).devices == 6


def test_a_dry_run_reports_the_plan_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(
        "pretrain", "-c", "pretrain/openelm-1_1b", "--dry-run", "--devices", 64
    )
    assert result.exit_code == 0, result.stderr
    for words in ("1,080,153,600", "4,194,304 tokens: 64 devices x 2 x 16", "350,000"):
        assert words in result.stdout
    assert "learning_rate: 0.0024" in result.stdout
    assert "Missing: The tokenizer, tokenizer.model, is not a file" in result.stderr
    assert "refinedweb" in result.stderr
    result = call("pretrain", "-c", "pretrain/openelm-3b", "--dry-run", "--json")
    output = json.loads(result.stdout)
    assert output["recipe"]["model"]["name"] == "3B"
    assert output["plan"]["parameters"] == 3_037_040_640
    assert output["plan"]["memory"]["fsdp"]["total"] > 2**30
    assert not list(tmp_path.iterdir())


def test_a_dry_run_needs_no_torch():
    script = (
        "import sys; sys.modules['torch'] = None; sys.modules['mlx.core'] = None\n"
        "import converters.pretraining.plan as plan\n"
        "from converters.pretraining.recipe import PretrainRecipe\n"
        "from mlx_openelm.recipe_loader import load_recipe\n"
        "recipe = load_recipe(PretrainRecipe, 'pretrain/openelm-270m', {})\n"
        "print(plan.plan_pretraining(recipe).steps)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout == "350000\n", result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "nowhere/*.txt"), "nowhere/*.txt"),
        (("--data", "here.txt", "--resume"), "nothing to resume"),
        (("--data", "here.txt", "--init", "gone.pt"), "gone.pt, is not a file"),
    ],
)
def test_a_run_that_cannot_start_reports_one_error(
    tmp_path, monkeypatch, options, message
):
    pytest.importorskip("torch", reason="needs PyTorch")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("Once upon a time.")
    (tmp_path / "recipe.yaml").write_text(
        "model: {num_layers: 1, model_dim: 32, head_dim: 16, num_gqa_groups: 1}\n"
        "data: {packing: true}\noutput: run\n"
    )
    (tmp_path / "run").mkdir()
    expect_error(tmp_path, "pretrain", "-c", "recipe.yaml", *options, message=message)
