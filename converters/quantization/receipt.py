"""Quantization error, measured by running both models side by side, layer by layer.

The hidden states of both models are kept, so at most one layer of one model is in
memory, and both heads at the end.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.openelm import Block, from_start
from mlx_openelm.tensor_names import EMBEDDING, HEAD

NUM_TOKENS = 1024  # half a minute for the 270M on two cores
CHUNK = 128  # positions whose logits are in memory: 16 MB per model for 32000 pieces

Read = Callable[[str], mx.array]  # CoreNet name -> weight, in any floating dtype


@dataclass(frozen=True, slots=True)
class Receipt:
    """Divergence of a quantized model's next-token distributions from the original's.

    Attributes:
        text: name of the calibration text.
        tokens: number of predicted tokens.
        bits_per_weight: of the quantized model.
        mean_kl: KL(original || quantized), nats per token; `p99_kl` is its 99th
            percentile.
        top1_agreement: fraction of positions where both have the same most likely
            token.
        perplexity_before: of the original; `perplexity_after`: of the quantized model.
        mean_kl_rounded, top1_agreement_rounded: with the scales of plain rounding,
            where scales were learned.
    """

    text: str
    tokens: int
    bits_per_weight: float
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    perplexity_before: float
    perplexity_after: float
    mean_kl_rounded: float | None = None
    top1_agreement_rounded: float | None = None


def measure_quantization(
    config: OpenELMConfig,
    reference: Read,
    quantized: Read,
    windows: mx.array,
    *,
    text: str,
    bits_per_weight: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Receipt:
    """Compare two models of one shape, in float32, on windows of text.

    Args:
        reference: reads the original weights.
        quantized: reads the quantized weights, unpacked.
        windows: token ids (N, 1 + T); all but the first of each are predicted.
        text: name of the text, for the receipt.
        on_progress: called with the layers done and the number of layers.

    Raises:
        OpenELMError: a model's loss is not finite.
    """
    models = [LayerwiseModel(config, read) for read in (reference, quantized)]
    inputs, targets = windows[:, :-1], windows[:, 1:].reshape(-1)
    before, after = run_side_by_side(models, inputs, on_progress)
    before_head, after_head = (model.head() for model in models)
    parts = []
    for start in range(0, targets.size, CHUNK):
        rows = slice(start, start + CHUNK)
        parts.append(
            _compare(before_head(before[rows]), after_head(after[rows]), targets[rows])
        )
    kl, agrees, nats_before, nats_after = np.concatenate(parts, axis=1)
    if not np.isfinite([kl, nats_before, nats_after]).all():
        raise OpenELMError(
            f"The loss on {text} is not finite, so the weights are damaged or "
            "activations overflow; download the checkpoint again."
        )
    return Receipt(
        text=text,
        tokens=targets.size,
        bits_per_weight=bits_per_weight,
        mean_kl=float(kl.mean()),
        p99_kl=float(np.quantile(kl, 0.99)),
        top1_agreement=float(agrees.mean()),
        perplexity_before=_perplexity(nats_before),
        perplexity_after=_perplexity(nats_after),
    )


def _compare(
    before: mx.array, after: mx.array, targets: mx.array
) -> npt.NDArray[np.float64]:
    """Return KL, agreement and both models' loss in nats (4, C) for logits (C, V)."""
    p, q = nn.log_softmax(before), nn.log_softmax(after)
    columns = targets[:, None]
    measures = mx.stack(
        [
            (mx.exp(p) * (p - q)).sum(axis=-1),
            (p.argmax(axis=-1) == q.argmax(axis=-1)).astype(mx.float32),
            -mx.take_along_axis(p, columns, axis=-1)[:, 0],
            -mx.take_along_axis(q, columns, axis=-1)[:, 0],
        ]
    )
    return np.array(measures).astype(np.float64)


def _perplexity(nats: npt.NDArray[np.float64]) -> float:
    mean = float(nats.mean())
    return math.exp(min(mean, 700.0))  # JSON has no infinity


# Running models layer by layer -----------------------------------------------------


@dataclass(frozen=True)
class LayerwiseModel:
    """A model in float32 whose weights are in memory only while they are used."""

    config: OpenELMConfig
    read: Read

    def embed(self, tokens: mx.array) -> mx.array:
        """Return the token embeddings (N, T, D)."""
        x = self.read(EMBEDDING)[tokens].astype(mx.float32)
        mx.eval(x)
        return x

    def block(self, layer: int) -> Block:
        block = Block(self.config, layer)
        prefix = f"layers.{layer}."
        names = [n for n in self.config.tensor_shapes() if n.startswith(prefix)]
        block.load_weights(
            [(n.removeprefix(prefix), self.read(n).astype(mx.float32)) for n in names]
        )
        return block

    def norm(self, x: mx.array) -> mx.array:
        """Return the final norm (N * T, D) of hidden states (N, T, D)."""
        weight = self.read("norm.weight").astype(mx.float32)
        rows = x.reshape(-1, self.config.model_dim)
        return mx.fast.rms_norm(rows, weight, self.config.rms_norm_eps)

    def head(self) -> Callable[[mx.array], mx.array]:
        """Return a function from normed hidden states (C, D) to logits (C, V)."""
        name = EMBEDDING if self.config.share_input_output_layers else HEAD
        head = self.read(name).astype(mx.float32)
        return lambda x: x @ head.T


def run_side_by_side(
    models: Sequence[LayerwiseModel],
    tokens: mx.array,
    on_progress: Callable[[int, int], None],
) -> list[mx.array]:
    """Return each model's normed hidden states (N * T, D), read layer by layer.

    Args:
        models: all of the same shape.
        tokens: ids (N, T).
        on_progress: called with the layers done and the number of layers.
    """
    config = models[0].config
    hidden = [model.embed(tokens) for model in models]  # (N, T, D) each
    rotate, layout = from_start(config, tokens.shape[1])
    for layer in range(config.num_transformer_layers):
        for i, model in enumerate(models):
            hidden[i] = model.block(layer)(hidden[i], rotate, layout)
            mx.eval(hidden[i])
        on_progress(layer + 1, config.num_transformer_layers)
    return [model.norm(x) for model, x in zip(models, hidden, strict=True)]
