"""Whether a decode step that is queued ahead copies the KV cache on this device.

    python benchmarks/cache_copies.py [--slots 16384] [--layers 1 4 16]

For each number of layers and each way of queueing: milliseconds a token, and the peak
memory beyond the cache. A copy shows as about half of one layer's cache or more. Models
of one layer are the hard case: with more, the buffer is free when its turn comes.
"""

import argparse
import time

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core

import mlx.core as mx  # isort: skip

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.generation.cache import KVCache
from mlx_openelm.generation.decoding import Context, draw_tokens
from mlx_openelm.generation.options import Sampling
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.tuning import QUEUES, Tuning


def measure(layers: int, slots: int, queue: str) -> tuple[float, float, float]:
    """Return ms a token, MB of cache, and MB beyond it at the peak."""
    config = OpenELMConfig(
        model_dim=512,
        head_dim=64,
        num_query_heads=(8,) * layers,
        num_kv_heads=(8,) * layers,
        ffn_dims=(64,) * layers,
        vocab_size=300,
        max_context_length=2 * slots,
    )
    model = OpenELM(config)
    model.eval()
    mx.eval(model.parameters())
    used = slots - 100
    context = Context(model, tuning=Tuning(queue=queue))
    for layer in context.cache:
        layer.append(*(mx.zeros((1, 8, used, 64)) for _ in range(2)))
        mx.eval(layer.state)
    context.tokens = [1] * used
    tokens = draw_tokens(model, [1] * used + [5], Sampling(), 40, context=context)
    for _ in range(8):
        next(tokens)
    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.perf_counter()
    for _ in range(24):
        next(tokens)
    seconds = (time.perf_counter() - started) / 24
    stored = sum(array.nbytes for layer in context.cache for array in layer.state)
    held = stored + sum(array.nbytes for _, array in _parameters(model))
    return 1e3 * seconds, stored / 1e6, (mx.get_peak_memory() - held) / 1e6


def _parameters(model: OpenELM) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, default=2**14)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    KVCache.step = options.slots
    print(f"{mx.default_device()}, MLX {mx.__version__}")
    for layers in options.layers:
        for queue in QUEUES:
            ms, cache, beyond = measure(layers, options.slots, queue)
            print(
                f"{layers} layers, {queue}: {ms:.1f} ms a token, cache {cache:.0f} MB, "
                f"peak {beyond:+.0f} MB"
            )


if __name__ == "__main__":
    main()
