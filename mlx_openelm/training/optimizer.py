"""MLX's optimizers, with weight decay for matrices only."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_openelm.tensor_names import EMBEDDING, to_module
from mlx_openelm.training.arrays import trained_tensors

_EMBEDDING = to_module(EMBEDDING)


def make_optimizer(
    model: nn.Module,
    name: str,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    *,
    b_ratio: float = 1.0,
) -> optim.Optimizer:
    """Return an optimizer, initialised for the model's trainable weights.

    Vectors (norms, magnitudes) have no weight decay, as in OpenELM's pre-training. The
    learning rate is set before each update.

    Args:
        name: adamw, adam, sgd, lion, muon or adafactor.
        betas: Adam's; SGD uses the first as momentum, Muon the second.
        b_ratio: learning rate of the matrices B of linear layers, as a multiple of that
            of all others (LoRA+: Hayou et al., arXiv 2402.12354).
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
    vectors = weight_decay and any(array.ndim < 2 for array in trained)
    if b_ratio != 1:
        optimizer = _FasterB(build(weight_decay), optimizer, build(0.0), b_ratio)
    elif vectors:
        optimizer = optim.MultiOptimizer(
            [optimizer, build(0.0)], [lambda _, weight: weight.ndim >= 2]
        )
    optimizer.init(model.trainable_parameters())
    mx.eval(optimizer.state)
    return optimizer


class _FasterB(optim.MultiOptimizer):
    """Optimizers of the matrices B, which have a larger rate, of others, of vectors.

    B of an embedding has the rate of the others: its A can be the matrix that starts at
    zero.
    """

    def __init__(
        self,
        of_b: optim.Optimizer,
        of_others: optim.Optimizer,
        of_vectors: optim.Optimizer,
        ratio: float,
    ) -> None:
        self._ratio = ratio
        super().__init__(
            [of_b, of_others, of_vectors],
            [
                lambda path, _: path.endswith("lora_b") and _EMBEDDING not in path,
                lambda _, weight: weight.ndim >= 2,
            ],
        )

    @property
    def learning_rate(self) -> Any:
        return self.optimizers[1].learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: Any) -> None:
        of_b, *others = self.optimizers
        of_b.learning_rate = rate * self._ratio
        for optimizer in others:
            optimizer.learning_rate = rate
