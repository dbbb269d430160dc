"""Log-likelihoods of given tokens, in chunks: the full logits never exist."""

import mlx.core as mx
import mlx.nn as nn

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
