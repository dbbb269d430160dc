"""Log-likelihoods and the loss, in chunks: the full logits never exist."""

import mlx.core as mx
import mlx.nn as nn

from mlx_openelm.model.chunk_sizes import LOGIT_ROWS, training_logit_rows
from mlx_openelm.model.kernels import softmax_parts
from mlx_openelm.model.openelm import OpenELM


def log_likelihoods(
    model: OpenELM, inputs: mx.array, targets: mx.array, *, chunk: int = LOGIT_ROWS
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
    chunk = training_logit_rows(head.shape[0])
    starts = range(0, rows.shape[0], chunk)
    parts = [slice(start, start + chunk) for start in starts]
    rows, head = rows.astype(mx.float32), head.astype(mx.float32)

    @mx.custom_function
    def losses(rows: mx.array, head: mx.array) -> tuple[mx.array, mx.array]:
        found, pulls = list[mx.array](), list[mx.array]()
        for part in parts:
            own = rows[part]
            if found:  # a chunk waits for the one before
                own = mx.depends(own, (pulls if gradient else found)[-1])
            powers, total, log_total = softmax_parts(own, head)
            wanted = head[targets[part]]
            loss = log_total - (own * wanted).sum(axis=-1)
            found.append(loss + z_loss * mx.square(log_total))
            if gradient:
                # What the softmax expects of the head, less the target's row
                expected = (powers @ head) / total
                pulls.append((1 + 2 * z_loss * log_total)[:, None] * expected - wanted)
        return mx.concatenate(found), mx.concatenate(pulls or found)

    @losses.vjp
    def losses_vjp(
        primals: tuple[mx.array, mx.array],
        cotangents: tuple[mx.array, mx.array],
        outputs: tuple[mx.array, mx.array],
    ) -> tuple[mx.array, mx.array]:
        rows, head = primals
        weights = cotangents[0][:, None]  # (M, 1)
        # The head's own gradient, if it is trained: lazily, so else it costs nothing.
        for_head = mx.zeros_like(head)
        for part in parts:
            own = mx.depends(rows[part], for_head)
            powers, total, log_total = softmax_parts(own, head)
            pull = weights[part] * (1 + 2 * z_loss * log_total)[:, None] / total
            for_head = for_head + powers.T @ (pull * own)
        return weights * outputs[1], for_head.at[targets].add(-weights * rows)

    found: mx.array = losses(rows, head)[0]  # type: ignore[index] # untyped
    return found
