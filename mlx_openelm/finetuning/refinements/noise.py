"""Noise on the embeddings in training (NEFTune: Jain et al., arXiv 2310.05914)."""

import mlx.core as mx

from mlx_openelm.model.token_layout import Sequences, TokenLayout


class EmbeddingNoise:
    """Adds uniform noise within alpha / sqrt(L D) to sequences of L tokens."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._key: mx.array | None = None

    def use_key(self, key: mx.array | None) -> None:
        """Set the random key; None turns the noise off."""
        self._key = key

    def __call__(self, x: mx.array, layout: TokenLayout) -> mx.array:
        """Return the embeddings (B, T, D) with noise."""
        if self._key is None:
            return x
        B, T, D = x.shape
        lengths = layout.lengths if isinstance(layout, Sequences) else (T,)
        sizes = [length for length in lengths for _ in range(length)]
        bounds = self._alpha / mx.sqrt(mx.array(sizes, mx.float32) * D)  # (T,)
        noise = mx.random.uniform(-1, 1, (B, T, D), key=self._key)
        return x + (bounds[:, None] * noise).astype(x.dtype)
