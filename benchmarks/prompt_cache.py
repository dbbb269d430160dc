"""How soon the first token comes when the prompt was kept, beside reading it anew.

    python benchmarks/prompt_cache.py [--tokens 1500] [--rounds 3]

The model has the shape of the 270M and made weights: speed does not depend on their
values. Both sides begin with the model in memory and end with the first token; with the
file that includes opening it, and making sure that it belongs to these weights.
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
        keeping = keep(model, prompt, file)
        anew, kept, checking = [], [], []
        for _ in range(options.rounds):
            anew.append(time_first(model, prompt, Context(model)))
            kept.append(time_kept(model, prompt, file))
            checking.append(seconds(lambda: fingerprint_model(model)))
        size = file.stat().st_size / 1e6
    slow, quick = statistics.median(anew), statistics.median(kept)
    print(f"first token of a prompt of {options.tokens}, 270M, {mx.default_device()}")
    print(f"  read anew    {slow:.3f} s")
    print(f"  kept         {quick:.3f} s, {quick / slow:.3f} of that")
    print(f"    of which the weights' fingerprint {statistics.median(checking):.3f} s")
    print(f"  written once {keeping:.3f} s until the next token, {size:.0f} MB")


def make_model() -> OpenELM:
    model = OpenELM(OpenELMConfig.preset("270M", vocab_size=32128))
    dtype = compute_dtype(mx.bfloat16)
    model.update(tree_map(lambda array: array.astype(dtype), model.parameters()))
    mx.eval(model.parameters())
    list(draw_tokens(model, [1, 2, 3, 4], Sampling(), 2))
    return model


def keep(model: OpenELM, prompt: Sequence[int], file: Path) -> float:
    """Keep the prompt; return the seconds for which the answer waits."""
    with open_prompt_cache(file, model, "raw") as cache:
        tokens = draw_tokens(model, prompt, Sampling(), 8, context=cache.context)
        next(tokens)
        waited = seconds(lambda: cache.keep(prompt))
        list(tokens)
    return waited


def time_kept(model: OpenELM, prompt: Sequence[int], file: Path) -> float:
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
