"""Log-likelihoods and the loss, in chunks, so that the full logits are never stored."""

import mlx.core as mx
import mlx.nn as nn

from mlx_openelm.device import takes_gpu_path
from mlx_openelm.model.chunk_sizes import (
    LOGIT_ROWS,
    fused_logit_rows,
    training_logit_rows,
)
from mlx_openelm.model.chunked_losses import chunked_losses
from mlx_openelm.model.kernels import softmax_parts
from mlx_openelm.model.openelm import OpenELM


def log_likelihoods(
    model: OpenELM, inputs: mx.array, targets: mx.array, *, chunk: int = LOGIT_ROWS
) -> mx.array:
    """Return log p(target | inputs up to its position), float32 (B, T), in nats.

    Args:
        inputs: token ids (B, T).
        targets: the token after each input, (B, T).
        chunk: positions scored at a time.
    """
    hidden = model.transformer(inputs)  # (B, T, D)
    B, T, D = hidden.shape
    rows, flat_targets = hidden.reshape(B * T, D), targets.reshape(B * T)
    parts = []
    for start in range(0, B * T, chunk):
        logits = model.head(rows[start : start + chunk]).astype(mx.float32)
        part = -nn.losses.cross_entropy(logits, flat_targets[start : start + chunk])
        mx.eval(part)  # frees this chunk's logits before the next chunk
        parts.append(part)
    return mx.concatenate(parts).reshape(B, T)


def token_losses(
    rows: mx.array,
    head: mx.array,
    targets: mx.array,
    *,
    z_loss: float = 0.0,
    gradient: bool = True,
) -> mx.array:
    """Return each position's loss, float32 (M,), in nats; differentiable.

    The loss is -log p(target) + z_loss * log(Z)^2, with Z the sum of exp(logit), as in
    OpenELM's pre-training. On a GPU the logits have the dtype of `rows`, and their
    softmax is computed in float32.

    Args:
        rows: normalised hidden states (M, D) of the positions with a loss.
        head: the output head (V, D).
        targets: the next token of each position, (M,).
        gradient: whether the gradient is needed.
    """
    if takes_gpu_path():
        return _fused_losses(rows, head, targets, z_loss, gradient)
    rows, head = rows.astype(mx.float32), head.astype(mx.float32)

    def forward(part: slice, hidden: mx.array, head: mx.array) -> tuple[mx.array, ...]:
        powers, total, log_z = softmax_parts(hidden, head)
        target_rows = head[targets[part]]  # (m, D)
        loss = log_z - (hidden * target_rows).sum(axis=-1)
        loss = loss + z_loss * mx.square(log_z)
        if not gradient:
            return (loss,)
        expected = (powers @ head) / total  # the softmax's mean row of the head
        factor = (1 + 2 * z_loss * log_z)[:, None]
        return loss, factor * expected - target_rows

    def head_gradient(
        part: slice, hidden: mx.array, head: mx.array, weights: mx.array
    ) -> mx.array:
        """Return the gradient without its part in the targets' rows."""
        powers, total, log_z = softmax_parts(hidden, head)
        factor = weights[:, None] * (1 + 2 * z_loss * log_z)[:, None] / total
        return powers.T @ (factor * hidden)

    def add_targets(d_head: mx.array, rows: mx.array, weights: mx.array) -> mx.array:
        return d_head.at[targets].add(-weights[:, None] * rows)

    chunk = training_logit_rows(head.shape[0])
    return chunked_losses(rows, head, chunk, forward, head_gradient, add_targets)


def _fused_losses(
    rows: mx.array, head: mx.array, targets: mx.array, z_loss: float, gradient: bool
) -> mx.array:
    """Return `token_losses` by MLX's fused cross-entropy, in large chunks."""
    head = head.astype(rows.dtype)

    def losses_of(hidden: mx.array, head: mx.array, part: slice) -> mx.array:
        logits = hidden @ head.T  # (m, V)
        losses = mx.fast.cross_entropy(logits, targets[part])
        if z_loss:
            log_z = mx.logsumexp(logits.astype(mx.float32), axis=-1)
            losses = losses + z_loss * mx.square(log_z)
        return losses

    def forward(part: slice, hidden: mx.array, head: mx.array) -> tuple[mx.array, ...]:
        if not gradient:
            return (losses_of(hidden, head, part),)
        ones = mx.ones((hidden.shape[0],))  # rows are independent
        (loss,), (d_hidden,) = mx.vjp(
            lambda hidden: losses_of(hidden, head, part), [hidden], [ones]
        )
        return loss, d_hidden

    def head_gradient(
        part: slice, hidden: mx.array, head: mx.array, weights: mx.array
    ) -> mx.array:
        _, (d_head,) = mx.vjp(
            lambda head: losses_of(hidden, head, part), [head], [weights]
        )
        return d_head

    chunk = fused_logit_rows(head.shape[0])
    return chunked_losses(rows, head, chunk, forward, head_gradient)
