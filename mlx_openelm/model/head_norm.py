"""RMSNorm of all query and key heads in one call. Letters as in `openelm`."""

import operator

import mlx.core as mx
import mlx.nn as nn

from mlx_openelm.model.kernels import normalize


class HeadNorm:
    """Normalises query and key heads together, each with the weight of its own norm.

    The two weights (H,) are joined into one row per head, (Q + K, H). Decoding, where
    every operation costs time, reuses the joined rows until a weight is replaced.
    Longer inputs and training join them again.
    """

    def __init__(self) -> None:
        self._weights: tuple[mx.array, mx.array] | None = None
        self._joined: mx.array | None = None

    def __call__(
        self,
        x: mx.array,
        q_norm: nn.RMSNorm,
        k_norm: nn.RMSNorm,
        num_query_heads: int,
        *,
        cached: bool,
    ) -> mx.array:
        """Return the normalised heads of x (B, T, Q + K, H), query heads first.

        Args:
            cached: whether the tokens follow those of a cache, as in decoding.
        """
        T, heads = x.shape[1:3]
        decoding = cached and T == 1
        weights = q_norm.weight, k_norm.weight
        joined = self._joined if decoding and self._is_joined(weights) else None
        if joined is None:
            counts = num_query_heads, heads - num_query_heads
            rows = zip(weights, counts, strict=True)
            joined = mx.concatenate([mx.tile(w, (count, 1)) for w, count in rows])
            if not q_norm.training:
                self._weights, self._joined = weights, joined
        return normalize(x, joined, q_norm.eps)

    def _is_joined(self, weights: tuple[mx.array, mx.array]) -> bool:
        return self._weights is not None and all(
            map(operator.is_, self._weights, weights)
        )
