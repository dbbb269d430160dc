"""MLX's optimizers, with weight decay for matrices only."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_openelm.training.arrays import trained_tensors


def make_optimizer(
    model: nn.Module,
    name: str,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> optim.Optimizer:
    """Return an optimizer, initialised for the model's trainable weights.

    Vectors (norms, magnitudes) have no weight decay, as in OpenELM's pre-training. The
    learning rate is set before each update.

    Args:
        name: adamw, adam, sgd, lion, muon or adafactor.
        betas: Adam's; SGD uses the first as momentum, Muon the second.
    """
    moments = list(betas)

    def build(decay: float) -> optim.Optimizer:
        match name:
            case "adamw":
                return optim.AdamW(0.0, moments, eps, decay, bias_correction=True)
            case "adam":
                return optim.Adam(0.0, moments, eps, bias_correction=True)
            case "sgd":
                return optim.SGD(0.0, momentum=betas[0], weight_decay=decay)
            case "lion":
                return optim.Lion(0.0, moments, weight_decay=decay)
            case "muon":
                return optim.Muon(0.0, momentum=betas[1], weight_decay=decay)
            case _:
                return optim.Adafactor(
                    0.0, scale_parameter=False, relative_step=False, weight_decay=decay
                )

    optimizer = build(weight_decay)
    trained = trained_tensors(model).values()
    if weight_decay and any(array.ndim < 2 for array in trained):
        optimizer = optim.MultiOptimizer(
            [optimizer, build(0.0)], [lambda _, weight: weight.ndim >= 2]
        )
    optimizer.init(model.trainable_parameters())
    mx.eval(optimizer.state)
    return optimizer
