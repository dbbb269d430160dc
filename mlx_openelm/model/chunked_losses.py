"""Losses of M positions with their gradients, in chunks of m positions.

The logits (m, V) of only one chunk exist at a time: the gradient by the hidden states
is computed with the losses, and each chunk depends on the one before.
"""

from collections.abc import Callable

import mlx.core as mx


def chunked_losses(
    rows: mx.array,
    head: mx.array,
    chunk: int,
    forward: Callable[[slice, mx.array, mx.array], tuple[mx.array, ...]],
    head_gradient: Callable[[slice, mx.array, mx.array, mx.array], mx.array],
    finish: Callable[..., mx.array] = lambda d_head, rows, weights: d_head,
) -> mx.array:
    """Return the losses (M,); they are differentiable if `forward` has gradients.

    Args:
        rows: hidden states (M, D).
        head: the output head (V, D).
        chunk: positions of a chunk.
        forward: called with the positions of a chunk, their rows and the head; returns
            the losses (m,) and, if they are needed, the gradients by the rows (m, D).
        head_gradient: called with the same and the weights of the losses (m,); returns
            the gradient by the head (V, D).
        finish: called with the sum of these, all rows and all weights; returns the
            whole gradient by the head.
    """
    parts = [slice(start, start + chunk) for start in range(0, rows.shape[0], chunk)]

    @mx.custom_function
    def compute(rows: mx.array, head: mx.array) -> tuple[mx.array, mx.array]:
        chunks = list[tuple[mx.array, ...]]()
        for part in parts:
            hidden = rows[part]
            if chunks:  # computes the chunks one after another
                hidden = mx.depends(hidden, chunks[-1][-1])
            chunks.append(forward(part, hidden, head))
        outputs = [mx.concatenate(list(each)) for each in zip(*chunks, strict=True)]
        return outputs[0], outputs[-1]

    @compute.vjp
    def compute_vjp(
        primals: tuple[mx.array, mx.array],
        cotangents: tuple[mx.array, mx.array],
        outputs: tuple[mx.array, mx.array],
    ) -> tuple[mx.array, mx.array]:
        (rows, head), weights = primals, cotangents[0]
        d_head = mx.zeros_like(head)  # lazy: not computed unless the head is trained
        for part in parts:
            hidden = mx.depends(rows[part], d_head)
            d_head = d_head + head_gradient(part, hidden, head, weights[part])
        d_rows = (weights[:, None] * outputs[1]).astype(rows.dtype)
        return d_rows, finish(d_head, rows, weights)

    losses: mx.array = compute(rows, head)[0]  # type: ignore[index] # untyped
    return losses
