"""Log-likelihoods and the loss, in chunks: the full logits never exist."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_openelm.kernels import LOG2_E
from mlx_openelm.model import OpenELM

CHUNK = 512  # positions whose logits exist at a time: 65 MB for 32000 pieces


def log_likelihoods(
    model: OpenELM, inputs: mx.array, targets: mx.array, *, chunk: int = CHUNK
) -> mx.array:
    """Return log p(target | inputs so far), float32 (B, T), in nats.

    Args:
        inputs: token ids (B, T); the target of each stands at its place in `targets`.
        chunk: positions scored at a time.
    """
    hidden = model.transformer(inputs)  # (B, T, D)
    B, T, D = hidden.shape
    rows, wanted = hidden.reshape(B * T, D), targets.reshape(B * T)
    parts = []
    for start in range(0, B * T, chunk):
        logits = model.head(rows[start : start + chunk]).astype(mx.float32)
        part = -nn.losses.cross_entropy(logits, wanted[start : start + chunk])
        mx.eval(part)  # so that this chunk's logits are gone before the next ones come
        parts.append(part)
    return mx.concatenate(parts).reshape(B, T)


def chunk_rows(vocab_size: int) -> int:
    """Return how many positions' logits exist at a time in training: about 65 MB."""
    return max(CHUNK * 32000 // vocab_size, 64)


def token_losses(
    rows: mx.array,
    head: mx.array,
    targets: mx.array,
    *,
    z_loss: float = 0.0,
    gradient: bool = True,
) -> mx.array:
    """Return each position's loss, float32 (M,), in nats; it can be differentiated.

    The loss is -log p(target) + z_loss * log(Z)^2, Z the sum of exp(logit), as in
    OpenELM's pre-training. The logits, in float32, exist for one chunk at a time: the
    gradient is computed with the loss, and a chunk waits for the one before.

    Args:
        rows: normed hidden states (M, D) of the positions that count.
        head: the output head (V, D).
        targets: (M,), the token that stands next.
        gradient: off, nothing is computed for it.
    """
    M, V = rows.shape[0], head.shape[0]
    chunk = chunk_rows(V)
    head = head.astype(mx.float32)
    parts: list[mx.array] = []
    for start in range(0, M, chunk):
        part = rows[start : start + chunk].astype(mx.float32)
        if parts:
            part = mx.depends(part, parts[-1])
        wanted = targets[start : start + chunk]
        if gradient:
            parts.append(_differentiable_losses(wanted, z_loss)(part, head))
        else:
            _, _, log_total, logits = _weigh(part, head, wanted)
            parts.append(log_total - logits + z_loss * mx.square(log_total))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


_Losses = Callable[[mx.array, mx.array], mx.array]


def _differentiable_losses(targets: mx.array, z_loss: float) -> _Losses:
    """Return the function (rows, head) -> losses (M,) with a gradient of its own."""

    @mx.custom_function
    def losses(rows: mx.array, head: mx.array) -> tuple[mx.array, mx.array]:
        powers, total, log_total, wanted = _weigh(rows, head, targets)
        loss = log_total - wanted + z_loss * mx.square(log_total)
        # d loss / d row: what the softmax expects of the head, less the target's row
        expected = (powers @ head) / total
        pull = (1 + 2 * z_loss * log_total)[:, None]
        return loss, pull * expected - head[targets]

    @losses.vjp
    def losses_vjp(
        primals: tuple[mx.array, mx.array],
        cotangents: tuple[mx.array, mx.array],
        outputs: tuple[mx.array, mx.array],
    ) -> tuple[mx.array, mx.array]:
        rows, head = primals
        weight = cotangents[0][:, None]  # (M, 1)
        # The head's own gradient, if it is trained: lazily, so else it costs nothing.
        powers, total, log_total, _ = _weigh(rows, head, targets)
        pull = weight * (1 + 2 * z_loss * log_total)[:, None] / total
        for_head = (powers * pull).T @ rows
        for_head = for_head.at[targets].add(-weight * rows)
        return weight * outputs[1], for_head

    return lambda rows, head: losses(rows, head)[0]  # type: ignore[index]


def _weigh(
    rows: mx.array, head: mx.array, targets: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return exp(logit - largest) (M, V), its sum (M, 1), log Z (M,), target logit.

    In powers of two: exp costs three times as much on the CPU.
    """
    logits = (rows * LOG2_E) @ head.T  # (M, V)
    largest = logits.max(axis=-1, keepdims=True)
    powers = mx.power(2.0, logits - largest)
    total = powers.sum(axis=-1, keepdims=True)
    log_total = (largest + mx.log2(total))[:, 0] / LOG2_E
    wanted = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] / LOG2_E
    return powers, total, log_total, wanted
