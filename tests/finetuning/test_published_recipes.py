"""The recipes of Apple's fine-tuned models have the published settings."""

import dataclasses
import re

import pytest

from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.recipe_loader import load_recipe

SIZES = {"270M": "270m", "450M": "450m", "1.1B": "1_1b", "3B": "3b"}
INSTRUCT = {  # CoreNet's README-instruct.md: epochs, rate, loss
    "270M": (5, 2e-5, "hinge"),
    "450M": (8, 3e-5, "hinge"),
    "1.1B": (5, 5e-5, "sigmoid"),
    "3B": (10, 1e-4, "hinge"),
}


def read_recipe(kind, size):
    return load_recipe(FinetuneRecipe, f"lora/{kind}-{SIZES[size]}", {})


@pytest.mark.parametrize("size", SIZES)
def test_instruct_recipes(size):
    recipe = read_recipe("instruct", size)
    settings = recipe.epochs, recipe.learning_rate, recipe.dpo_loss
    assert settings == INSTRUCT[size]
    assert (recipe.step_size, recipe.dpo_beta) == (128, 0.01)
    assert (recipe.max_seq_length, recipe.max_prompt_length) == (1024, 512)
    steps = recipe.epochs * 60_000 / 128
    assert recipe.warmup_steps == pytest.approx(steps / 10, rel=0.03)
    assert recipe.model == f"OpenELM-{size.replace('.', '_')}-mlx"


def test_the_instruct_settings_are_those_of_the_facts(shared):
    text = (shared / "facts" / "pretraining.md").read_text()
    rows = dict(re.findall(r"^\| (epochs|rate|loss) \| (.+) \|$", text, re.M))
    columns = [[cell.strip() for cell in rows[name].split("|")] for name in rows]
    for size, epochs, rate, loss in zip(SIZES, *columns, strict=True):
        assert INSTRUCT[size] == (int(epochs), float(rate), loss)


@pytest.mark.parametrize("size", SIZES)
def test_peft_recipes(size):
    recipe = read_recipe("openelm-peft", size)
    assert (recipe.rank, recipe.scale, recipe.dropout) == (32, 1.0, 0.1)
    assert recipe.adapt_embedding
    assert recipe.repair_text
    assert recipe.mask_prompt is False
    assert (recipe.iters, recipe.warmup_steps) == (4375, 1000)
    assert (recipe.learning_rate, recipe.final_learning_rate) == (3e-4, 3e-5)
    same = dataclasses.replace(recipe, model="")
    assert same == dataclasses.replace(read_recipe("openelm-peft", "270M"), model="")
