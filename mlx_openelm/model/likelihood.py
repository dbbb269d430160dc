"""Log-likelihoods and the loss, in chunks, so that the full logits are never stored."""

import mlx.core as mx
import mlx.nn as nn

from mlx_openelm.device import takes_gpu_path
from mlx_openelm.model.chunk_sizes import (
    LOGIT_ROWS,
    fused_logit_rows,
    training_logit_rows,
)
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
    OpenELM's pre-training. The logits of only one chunk exist at a time: the gradient
    is computed with the loss, and each chunk depends on the one before. On a GPU the
    logits have the dtype of `rows`, and their softmax is computed in float32.

    Args:
        rows: normalised hidden states (M, D) of the positions with a loss.
        head: the output head (V, D).
        targets: the next token of each position, (M,).
        gradient: whether the gradient is needed.
    """
    if takes_gpu_path():
        return _fused_losses(rows, head, targets, z_loss, gradient)
    chunk = training_logit_rows(head.shape[0])
    starts = range(0, rows.shape[0], chunk)
    parts = [slice(start, start + chunk) for start in starts]
    rows, head = rows.astype(mx.float32), head.astype(mx.float32)

    @mx.custom_function
    def compute_losses(rows: mx.array, head: mx.array) -> tuple[mx.array, mx.array]:
        losses, row_gradients = list[mx.array](), list[mx.array]()
        for part in parts:
            hidden = rows[part]  # (m, D)
            if losses:  # computes the chunks one after another
                hidden = mx.depends(hidden, (row_gradients if gradient else losses)[-1])
            powers, total, log_z = softmax_parts(hidden, head)
            target_rows = head[targets[part]]  # (m, D)
            loss = log_z - (hidden * target_rows).sum(axis=-1)
            losses.append(loss + z_loss * mx.square(log_z))
            if gradient:
                expected = (powers @ head) / total  # the softmax's mean row of the head
                factor = (1 + 2 * z_loss * log_z)[:, None]
                row_gradients.append(factor * expected - target_rows)
        return mx.concatenate(losses), mx.concatenate(row_gradients or losses)

    @compute_losses.vjp
    def losses_vjp(
        primals: tuple[mx.array, mx.array],
        cotangents: tuple[mx.array, mx.array],
        outputs: tuple[mx.array, mx.array],
    ) -> tuple[mx.array, mx.array]:
        rows, head = primals
        weights = cotangents[0][:, None]  # (M, 1)
        d_head = mx.zeros_like(head)  # lazy: not computed unless the head is trained
        for part in parts:
            hidden = mx.depends(rows[part], d_head)
            powers, total, log_z = softmax_parts(hidden, head)
            factor = weights[part] * (1 + 2 * z_loss * log_z)[:, None] / total
            d_head = d_head + powers.T @ (factor * hidden)  # (V, D)
        return weights * outputs[1], d_head.at[targets].add(-weights * rows)

    losses: mx.array = compute_losses(rows, head)[0]  # type: ignore[index] # untyped
    return losses


def _fused_losses(
    rows: mx.array, head: mx.array, targets: mx.array, z_loss: float, gradient: bool
) -> mx.array:
    """Return `token_losses` by MLX's fused cross-entropy, in large chunks."""
    head = head.astype(rows.dtype)
    chunk = fused_logit_rows(head.shape[0])
    parts = [slice(start, start + chunk) for start in range(0, rows.shape[0], chunk)]

    def losses_of(hidden: mx.array, head: mx.array, part: slice) -> mx.array:
        logits = hidden @ head.T  # (m, V)
        losses = mx.fast.cross_entropy(logits, targets[part])
        if z_loss:
            log_z = mx.logsumexp(logits.astype(mx.float32), axis=-1)
            losses = losses + z_loss * mx.square(log_z)
        return losses

    @mx.custom_function
    def compute_losses(rows: mx.array, head: mx.array) -> tuple[mx.array, mx.array]:
        losses, row_gradients = list[mx.array](), list[mx.array]()
        for part in parts:
            hidden = rows[part]
            if losses:  # computes the chunks one after another
                hidden = mx.depends(hidden, (row_gradients if gradient else losses)[-1])
            if gradient:  # rows are independent, so this is the gradient of each
                ones = mx.ones((hidden.shape[0],))
                (loss,), (d_hidden,) = mx.vjp(
                    lambda x, part=part: losses_of(x, head, part), [hidden], [ones]
                )
                row_gradients.append(d_hidden)
            else:
                loss = losses_of(hidden, head, part)
            losses.append(loss)
        return mx.concatenate(losses), mx.concatenate(row_gradients or losses)

    @compute_losses.vjp
    def losses_vjp(
        primals: tuple[mx.array, mx.array],
        cotangents: tuple[mx.array, mx.array],
        outputs: tuple[mx.array, mx.array],
    ) -> tuple[mx.array, mx.array]:
        rows, head = primals
        weights = cotangents[0]  # (M,)
        d_head = mx.zeros_like(head)  # lazy: not computed unless the head is trained
        for part in parts:
            hidden = mx.depends(rows[part], d_head)
            _, (d_part,) = mx.vjp(
                lambda head, hidden=hidden, part=part: losses_of(hidden, head, part),
                [head],
                [weights[part]],
            )
            d_head = d_head + d_part
        return (weights[:, None] * outputs[1]).astype(rows.dtype), d_head

    losses: mx.array = compute_losses(rows, head)[0]  # type: ignore[index] # untyped
    return losses
