"""The losses of a batch: cross-entropy of target tokens, DPO and ORPO of pairs."""

import mlx.core as mx

from mlx_openelm.finetuning.batches import Batch
from mlx_openelm.model.likelihood import token_losses
from mlx_openelm.model.lora import adapted_weight
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.token_layout import Sequences


def batch_losses(
    model: OpenELM, batch: Batch, *, z_loss: float = 0.0, gradient: bool = True
) -> mx.array:
    """Return the cross-entropy of each target token, float32 (M,), in nats.

    The output head is computed at target positions only.

    Args:
        z_loss: weight of the squared log-partition function.
        gradient: whether the loss will be differentiated; the gradient is then computed
            together with it.
    """
    rows = target_rows(model, batch)
    head = adapted_weight(model.head_module)  # (V, D)
    targets = mx.array(batch.targets)
    return token_losses(rows, head, targets, z_loss=z_loss, gradient=gradient)


def target_rows(model: OpenELM, batch: Batch) -> mx.array:
    """Return the normalised hidden states (M, D) of the positions with a target."""
    tokens = mx.array(batch.tokens)[None]  # (1, N)
    hidden = model.transformer(tokens, layout=Sequences(batch.lengths))[0]  # (N, D)
    rows: mx.array = hidden[mx.array(batch.positions)]
    return rows


def sequence_likelihoods(
    model: OpenELM, batch: Batch, *, gradient: bool = True
) -> mx.array:
    """Return log p(targets | prompt) of each sequence, float32, in nats."""
    sums = mx.zeros((len(batch.lengths),))
    losses = batch_losses(model, batch, gradient=gradient)
    return sums.at[mx.array(batch.sequence)].add(-losses)


def preference_margins(
    likelihoods: mx.array, reference: mx.array, *, beta: float
) -> mx.array:
    """Return beta * (log-ratio of the policy - log-ratio of the reference), (P,).

    DPO: Rafailov et al., arXiv 2305.18290, equation 7.

    Args:
        likelihoods: log-likelihoods (2 P,) of the chosen answers, then of the rejected
            ones, under the trained model.
        reference: the same under the reference model.
    """
    chosen, rejected = mx.split(likelihoods - reference, 2)
    return beta * (chosen - rejected)


def preference_losses(margins: mx.array, kind: str) -> mx.array:
    """Return the loss of each pair (P,).

    Args:
        kind: "sigmoid", -log sigmoid(margin), or "hinge" (arXiv 2309.06657).
    """
    if kind == "hinge":
        return mx.maximum(1 - margins, 0)
    return mx.logaddexp(mx.zeros_like(margins), -margins)


def odds_ratio_losses(
    likelihoods: mx.array, counts: mx.array, *, weight: float
) -> tuple[mx.array, mx.array]:
    """Return the loss of each pair (P,), and the log of its odds ratio (P,).

    ORPO (Hong et al., arXiv 2403.07691, equations 3 to 7): the mean loss of the chosen
    answer's tokens, plus `weight` times -log sigmoid(log odds ratio). The likelihood of
    an answer is the geometric mean over its tokens.

    Args:
        likelihoods: log-likelihoods (2 P,) of the chosen answers, then of the rejected
            ones.
        counts: their numbers of tokens.
    """
    means = mx.minimum(likelihoods / counts, -1e-7)
    log_odds = means - mx.log(-mx.expm1(means))
    chosen, rejected = mx.split(log_odds, 2)
    ratios = chosen - rejected
    penalty = mx.logaddexp(mx.zeros_like(ratios), -ratios)
    return weight * penalty - mx.split(means, 2)[0], ratios
