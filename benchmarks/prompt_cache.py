"""Time to the first token with a prompt cache, compared with a full prefill.

    python benchmarks/prompt_cache.py [--tokens 1500] [--rounds 3]

The model has the shape of the 270M and synthetic weights. Both measurements begin with
the model in memory and end with the first token; with the cache that includes opening
the file and checking the fingerprint of the weights.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core

# isort: split
import mlx.core as mx
from mlx.utils import tree_map

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.device import compute_dtype
from mlx_openelm.generation.decoding import Context, draw_tokens
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.prompt_cache import open_prompt_cache
from mlx_openelm.model.fingerprint import fingerprint_model
from mlx_openelm.model.openelm import OpenELM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = make_model()
    prompt = [1, *(7 + 31 * i % 30000 for i in range(options.tokens - 1))]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        file = Path(folder, "prompt.cache")
        writing = store(model, prompt, file)
        prefilled, cached, checking = [], [], []
        for _ in range(options.rounds):
            prefilled.append(time_first(model, prompt, Context(model)))
            cached.append(time_cached(model, prompt, file))
            checking.append(seconds(lambda: fingerprint_model(model)))
        size = file.stat().st_size / 1e6
    slow, fast = statistics.median(prefilled), statistics.median(cached)
    print(f"first token of a prompt of {options.tokens}, 270M, {mx.default_device()}")
    print(f"  full prefill {slow:.3f} s")
    print(f"  from cache   {fast:.3f} s, {fast / slow:.3f} of that")
    print(f"    of which the fingerprint {statistics.median(checking):.3f} s")
    print(f"  written once {writing:.3f} s until the next token, {size:.0f} MB")


def make_model() -> OpenELM:
    model = OpenELM(OpenELMConfig.preset("270M", vocab_size=32128))
    dtype = compute_dtype(mx.bfloat16)
    model.update(tree_map(lambda array: array.astype(dtype), model.parameters()))
    mx.eval(model.parameters())
    list(draw_tokens(model, [1, 2, 3, 4], Sampling(), 2))
    return model


def store(model: OpenELM, prompt: Sequence[int], file: Path) -> float:
    """Store the prompt; return the seconds by which this delays the answer."""
    with open_prompt_cache(file, model, "raw") as cache:
        tokens = draw_tokens(model, prompt, Sampling(), 8, context=cache.context)
        next(tokens)
        delay = seconds(lambda: cache.store(prompt))
        list(tokens)
    return delay


def time_cached(model: OpenELM, prompt: Sequence[int], file: Path) -> float:
    started = time.perf_counter()
    with open_prompt_cache(file, model, "raw", print) as cache:
        opened = time.perf_counter() - started
        if len(cache.context.tokens) != len(prompt):
            raise SystemExit("the file was not used")
        return opened + time_first(model, prompt, cache.context)


def time_first(model: OpenELM, prompt: Sequence[int], context: Context) -> float:
    tokens = draw_tokens(model, prompt, Sampling(), 1, context=context)
    return seconds(lambda: next(tokens))


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
