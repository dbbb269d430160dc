"""Speed of prefix sharing in multiple-choice tasks, compared with single choices.

    python benchmarks/evaluation.py COMMONSENSE_FOLDER TOKENIZER_MODEL
        [--limit 100] [--rounds 3] [--naive 8] [--only ARC-Easy,piqa]

The 270M with synthetic weights scores the first questions of every file in the folder,
in float32. Both sides use the same code, without padding and with the output head at
scored positions only; one passes all requests at once, so that prefixes are shared, the
other one request at a time. They are measured alternately in one process, and the ratio
of the medians is printed. All log-likelihoods must agree. Some questions are also
scored without sharing: a forward pass and all logits for every choice.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mlx_openelm.bench.selfcheck import made_weight
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.evaluation.loglikelihood import (
    Request,
    encode_requests,
    score_requests,
)
from mlx_openelm.evaluation.task_files import read_task
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.tensor_names import to_folder
from mlx_openelm.text.tokenizer import Tokenizer  # and OpenBLAS, before mlx.core


def score(model: OpenELM, requests: list[Request], *, shared: bool) -> list[float]:
    nats: dict[int, float] = {}
    size = len(requests) if shared else 1
    for start in range(0, len(requests), size):
        for i, scored in score_requests(model, requests[start : start + size]):
            nats[start + i] = scored.nats
    return [nats[i] for i in range(len(requests))]


def score_naively(model: OpenELM, requests: list[Request]) -> list[float]:
    import mlx.core as mx
    import mlx.nn as nn

    nats = []
    for request in requests:
        whole = mx.array([request.context + request.continuation])
        inputs, targets = whole[:, :-1], whole[:, 1:]
        losses = nn.losses.cross_entropy(model(inputs).astype(mx.float32), targets)
        nats.append(-losses[0, -len(request.continuation) :].sum().item())
    return nats


def measure(run: Callable[[], list[float]]) -> tuple[list[float], float]:
    started = time.perf_counter()
    return run(), time.perf_counter() - started


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def compare(model: OpenELM, tokenizer: Tokenizer, path: Path, options) -> None:
    task = read_task(path, limit=options.limit)
    requests = encode_requests(
        tokenizer, [pair for question in task.questions for pair in question.pairs]
    )
    few = sum(len(q.choices) for q in task.questions[: options.naive])
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(options.rounds):
        scores = {}
        for shared, seconds in times.items():
            scores[shared], took = measure(
                partial(score, model, requests, shared=shared)
            )
            seconds.append(took)
        difference = largest_difference(scores[True], scores[False])
        assert difference < 1e-3, f"{path.stem}: {difference} nats of difference"
    together, alone = (statistics.median(seconds) for seconds in times.values())
    line = (
        f"{path.stem}: {len(task.questions)} questions, {len(requests)} choices: "
        f"shared {together:.1f} s, single {alone:.1f} s, ratio "
        f"{alone / together:.2f}; at most {difference:.1e} nats of difference"
    )
    if few:
        naive, took = measure(lambda: score_naively(model, requests[:few]))
        assert largest_difference(naive, scores[True][:few]) < 1e-3
        slow = took / few / (together / len(requests))
        line += f"; without sharing, a choice takes {slow:.1f} times as long"
    print(line, flush=True)


def main() -> None:
    import mlx.core as mx

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--naive", type=int, default=8)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    config = OpenELMConfig.preset("270M", vocab_size=32128)
    model = OpenELM(config)
    model.load_weights(
        [
            (to_folder(name), mx.array(made_weight(name, shape, 0)))
            for name, shape in config.tensor_shapes().items()
        ]
    )
    mx.eval(model.parameters())
    tokenizer = Tokenizer.from_file(options.tokenizer)
    for path in sorted(options.folder.glob("*.json")):
        if path.stem in (options.only.split(",") if options.only else [path.stem]):
            compare(model, tokenizer, path, options)


if __name__ == "__main__":
    main()
