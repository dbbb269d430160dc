"""The optimizer that a recipe names: MLX's own, with a recipe's settings."""

import mlx.core as mx
import mlx.optimizers as optim

from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.trainable import trained_tensors
from mlx_openelm.model.openelm import OpenELM


def make_optimizer(model: OpenELM, recipe: FinetuneRecipe) -> optim.Optimizer:
    """Return the recipe's optimizer, ready for the model's trainable weights.

    Vectors (norms, magnitudes) have no weight decay, as in OpenELM's pre-training.
    """
    betas, eps, decay = list(recipe.betas), recipe.eps, recipe.weight_decay

    def build(decay: float) -> optim.Optimizer:
        match recipe.optimizer:
            case "adamw":
                return optim.AdamW(0.0, betas, eps, decay, bias_correction=True)
            case "adam":
                return optim.Adam(0.0, betas, eps, bias_correction=True)
            case "sgd":
                return optim.SGD(0.0, momentum=betas[0], weight_decay=decay)
            case "lion":
                return optim.Lion(0.0, betas, weight_decay=decay)
            case "muon":
                return optim.Muon(0.0, momentum=betas[1], weight_decay=decay)
            case _:
                return optim.Adafactor(
                    0.0, scale_parameter=False, relative_step=False, weight_decay=decay
                )

    optimizer = build(decay)
    if decay and any(array.ndim < 2 for array in trained_tensors(model).values()):
        optimizer = optim.MultiOptimizer(
            [optimizer, build(0.0)], [lambda _, weight: weight.ndim >= 2]
        )
    optimizer.init(model.trainable_parameters())
    mx.eval(optimizer.state)
    return optimizer
