"""The totals of each objective, compared with sums computed from plain logits."""

import math

import mlx.core as mx
import numpy as np
import pytest
from models import UNEVEN, build
from trainings import make_pairs, make_recipe, make_samples

from mlx_openelm.finetuning.further_objectives.choice import make_objective
from mlx_openelm.finetuning.recipe import OBJECTIVES
from mlx_openelm.finetuning.samples import Sample
from mlx_openelm.model.openelm import OpenELM


def log_likelihood(model: OpenELM, sample: Sample) -> float:
    """Return log p of the targets, from the plain logits."""
    logits = np.array(model(mx.array(sample.tokens)[None, :-1]))[0].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    positions = np.flatnonzero(sample.loss_mask)
    return float(sum(log_p[i - 1, sample.tokens[i]] for i in positions))


def both_totals(objective, model, samples):
    batch = objective.collate(samples)
    return objective.totals(batch, *objective.loss(model, batch)), objective.evaluate(
        model, batch
    )


def test_supervised_sums_the_losses_of_the_targets():
    model, samples = build(UNEVEN), make_samples()
    objective = make_objective(make_recipe())
    loss = -sum(log_likelihood(model, sample) for sample in samples)
    count = sum(int(sample.loss_mask.sum()) for sample in samples)
    for totals in both_totals(objective, model, samples):
        assert totals.loss == pytest.approx(loss, rel=1e-5)
        assert (totals.count, totals.wins, totals.margin) == (count, 0, 0)
    assert (objective.unit, objective.pairwise) == ("token", False)


def test_preferences_are_measured_against_the_model_before_training():
    before, model, pairs = build(UNEVEN), build(UNEVEN, seed=1), make_pairs()
    recipe = make_recipe(objective="dpo")
    objective = make_objective(recipe)
    objective.precompute_reference(before, pairs)
    margins = [
        recipe.dpo_beta
        * (
            (log_likelihood(model, pair.chosen) - log_likelihood(before, pair.chosen))
            - log_likelihood(model, pair.rejected)
            + log_likelihood(before, pair.rejected)
        )
        for pair in pairs
    ]
    trained, evaluated = both_totals(objective, model, pairs)
    loss = sum(math.log1p(math.exp(-margin)) for margin in margins)
    for totals in (trained, evaluated):
        assert totals.loss == pytest.approx(loss, rel=1e-4)
        assert totals.count == len(pairs)
        assert totals.wins == sum(margin > 0 for margin in margins)
    assert trained.margin == pytest.approx(sum(margins), rel=1e-4)
    assert (objective.unit, objective.pairwise) == ("pair", True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_name_in_a_recipe_has_its_objective(name):
    teacher = "demo" if name == "distill" else None
    assert make_objective(make_recipe(objective=name, teacher=teacher)).name == name


@pytest.mark.parametrize(
    ("objective", "length", "rate"), [("sft", 2048, 3e-4), ("dpo", 1024, 5e-5)]
)
def test_an_objective_has_its_own_defaults(objective, length, rate):
    recipe = make_recipe(objective=objective, max_seq_length=None, learning_rate=None)
    chosen = make_objective(recipe)
    context = {"template": "raw", "model": "demo", "data": "none"}
    context |= {"default_length": chosen.default_length}
    context |= {"default_rate": chosen.default_rate}
    resolved = recipe.resolve(context_length=4096, **context)
    assert (resolved.max_seq_length, resolved.learning_rate) == (length, rate)
    assert resolved.max_prompt_length == length // 2
    assert recipe.resolve(context_length=512, **context).max_seq_length == 512
