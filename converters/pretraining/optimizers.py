"""Optimizers of pre-training (AdamW, Muon), and their learning-rate schedule."""

import math

import torch

from converters.pretraining.recipe import OptimizerRecipe
from converters.reference import ReferenceOpenELM


def learning_rate(recipe: OptimizerRecipe, step: int, steps: int) -> float:
    """Return a step's learning rate: linear warm-up, then cosine to the final rate."""
    if step < recipe.warmup_steps:
        progress = step / recipe.warmup_steps
        first = recipe.warmup_learning_rate
        return first + progress * (recipe.learning_rate - first)
    progress = (step - recipe.warmup_steps) / (steps - recipe.warmup_steps + 1)
    factor = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    span = recipe.learning_rate - recipe.final_learning_rate
    return recipe.final_learning_rate + span * factor


def build_optimizers(
    model: ReferenceOpenELM, recipe: OptimizerRecipe
) -> list[torch.optim.Optimizer]:
    """Return AdamW (weight decay on matrices only), with Muon also a Muon optimizer."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizers: list[torch.optim.Optimizer] = []
    if recipe.name == "muon":
        hidden = [p for p in model.layers.parameters() if p.ndim >= 2]
        matrices = [p for p in matrices if all(p is not h for h in hidden)]
        optimizers.append(
            torch.optim.Muon(
                hidden,
                lr=recipe.learning_rate,
                weight_decay=recipe.weight_decay,
                adjust_lr_fn="match_rms_adamw",  # the same learning rate fits both
            )
        )
    optimizers.append(
        torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
        )
    )
    return optimizers


def take_step(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Update the weights and clear the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
