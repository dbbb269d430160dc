"""Tokens per second of decoding, and the part of a step outside matrix products.

    python benchmarks/decoding.py [--rounds 9] [--model demo|270M ...]

Our decode loop, plain and compiled, and mlx-lm's `generate_step`: the same weights in
float32 and the same BLAS, one sequence, greedy. Each side has its own process for all
rounds; the rounds alternate, and medians are printed. The matrix products of a step are
timed separately in the same rounds: the same weights, one row, all of them queued at
once. The 270M has synthetic weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

# The decode loop uses one OpenBLAS thread for small models, so mlx-lm is also measured
# with one thread.
SIDES = ("ours", "ours, compiled", "mlx-lm", "mlx-lm, 1 thread")
PROMPT_TOKENS = 16
NEW_TOKENS = {"demo": 128, "270M": 24}


# In a worker process -----------------------------------------------------------------


def serve(side: str, name: str) -> None:
    """Run a round for each line on stdin and print its measurements."""
    import mlx_openelm  # noqa: F401 - loads OpenBLAS, for mlx-lm as well

    model = make_model(name)
    products = multiply_alone(model)
    run = {"ours": ours, "ours, compiled": ours_compiled}.get(side, mlx_lm)(model)
    tokens = list(run(8))  # warm-up, and compilation
    for _ in sys.stdin:
        multiplying = min(products() for _ in range(5))
        times, tokens = [], []
        for token in run(NEW_TOKENS[name]):
            times.append(time.perf_counter())
            tokens.append(token)
        step = (times[-1] - times[0]) / (len(times) - 1)
        print(json.dumps([step, multiplying, tokens]), flush=True)


def make_model(name: str):
    import mlx.core as mx

    from mlx_openelm import OpenELMConfig, load
    from mlx_openelm.model.openelm import OpenELM

    if name == "demo":
        return load("demo")[0]
    model = OpenELM(OpenELMConfig.preset(name))
    mx.random.seed(0)
    for _, module in model.named_modules():
        if "weight" in module and module.weight.ndim == 2:
            module.weight = mx.random.normal(module.weight.shape) * 0.02
    mx.eval(model.parameters())
    return model


def prompt(model) -> list[int]:
    return [1, *(i * 37 % 4000 + 3 for i in range(PROMPT_TOKENS - 1))]


def ours(model) -> Callable[[int], Iterable[int]]:
    from mlx_openelm.generation.decoding import draw_tokens
    from mlx_openelm.generation.options import Sampling
    from mlx_openelm.generation.step import plain_step

    return lambda count: (
        token.id
        for token in draw_tokens(
            model, prompt(model), Sampling(), count, step=plain_step(model)
        )
    )


def ours_compiled(model) -> Callable[[int], Iterable[int]]:
    from mlx_openelm.generation.decoding import draw_tokens
    from mlx_openelm.generation.options import Sampling
    from mlx_openelm.generation.step import compiled_step

    step = compiled_step(model)
    return lambda count: (
        token.id
        for token in draw_tokens(model, prompt(model), Sampling(), count, step=step)
    )


def mlx_lm(model) -> Callable[[int], Iterable[int]]:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.generate import generate_step
    from mlx_lm.models.openelm import Model, ModelArgs

    theirs = Model(ModelArgs.from_dict(model.config.to_dict()))
    theirs.load_weights(tree_flatten(model.parameters()))
    theirs.eval()
    ids = mx.array(prompt(model))
    return lambda count: (
        int(token) for token, _ in generate_step(ids, theirs, max_tokens=count)
    )


def multiply_alone(model) -> Callable[[], float]:
    """Return a function that times all products of a step: (1, in) with each weight."""
    import mlx.core as mx

    weights = [
        module.weight
        for _, module in model.named_modules()
        if "weight" in module and module.weight.ndim == 2
    ]
    rows = [mx.ones((1, weight.shape[1])) for weight in weights]
    mx.eval(rows)

    def multiply() -> float:
        started = time.perf_counter()
        mx.eval([x @ weight.T for x, weight in zip(rows, weights, strict=True)])
        return time.perf_counter() - started

    return multiply


# Side by side ------------------------------------------------------------------------


def compare(name: str, rounds: int) -> None:
    workers = {
        side: subprocess.Popen(
            [sys.executable, __file__, "--serve", side, "--model", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ({"OPENBLAS_NUM_THREADS": "1"} if "1" in side else {}),
        )
        for side in SIDES
    }
    steps: dict[str, list[float]] = {side: [] for side in SIDES}
    products: list[float] = []
    outputs = {}
    for _ in range(rounds):
        for side, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            step, multiplying, outputs[side] = json.loads(worker.stdout.readline())
            steps[side].append(step)
            products.append(multiplying)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    same = all(tokens == outputs["ours"] for tokens in outputs.values())
    alone = statistics.median(products)
    theirs = min(statistics.median(steps[side]) for side in SIDES[2:])
    print(f"\n{name}; matrix products {alone * 1e3:.2f} ms; same tokens: {same}")
    for side in SIDES:
        step = statistics.median(steps[side])
        rest = (theirs - alone) / max(step - alone, 1e-9)
        print(
            f"{side:<17} {1 / step:7.1f} tokens/s ({1 / max(steps[side]):.0f} to "
            f"{1 / min(steps[side]):.0f}), {theirs / step:5.2f} times the faster "
            f"mlx-lm; outside the products {(step - alone) * 1e3:6.2f} ms, "
            f"{rest:5.2f} times less"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", action="append", choices=list(NEW_TOKENS))
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.model or list(NEW_TOKENS)
    if options.serve:
        serve(options.serve, names[0])
        return
    for name in names:
        compare(name, options.rounds)


if __name__ == "__main__":
    main()
