"""Speed of continuous batching, compared with the same prompts one by one.

    python benchmarks/batching.py [--rounds 5] [--prompts 16] [--only demo,270M]

Both are measured alternately in one process, and the ratio of the medians is printed.
Prompts are 4 to 40 tokens long. Answers of the demo end at a paragraph; those of the
270M, which has synthetic weights, at any of one in 26 tokens. Decoding is greedy, and
the answers must be equal.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

import mlx_openelm  # loads OpenBLAS before mlx.core
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.generation.batching.answering import (
    BATCH_SIZE,
    BatchPrompt,
    answer_together,
)
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import stream
from mlx_openelm.model.openelm import OpenELM

TEXT = (
    "Once upon a time there was a king who had three daughters and a golden ring, "
    "and the wolf said to the old woman in the wood: I love you"
)

Answers = dict[int, tuple[int, ...]]


class Letters:
    """A substitute for a tokenizer: each token is a letter."""

    eos_id = 2

    def stream_decoder(self, after):
        return self

    def add(self, token: int) -> str:
        return chr(ord("a") + token % 26)

    def finish(self) -> str:
        return ""


def compare(
    name: str, model, tokenizer, words: Sequence[int], sampling: Sampling, options
) -> None:
    chance = random.Random(0)
    prompts = [
        BatchPrompt(n, [1, *chance.choices(words, k=chance.randint(3, 39))])
        for n in range(options.prompts)
    ]

    def one_by_one() -> Answers:
        return {
            q.number: tuple(
                piece.token
                for piece in stream(model, tokenizer, q.ids, sampling)
                if piece.token != tokenizer.eos_id
            )
            for q in prompts
        }

    def together() -> Answers:
        answered = answer_together(
            model, tokenizer, prompts, sampling, batch_size=options.batch_size
        )
        return {a.prompt.number: a.tokens for a in answered}

    expected = together()  # also warms up
    times: dict[Callable[[], Answers], list[float]] = {one_by_one: [], together: []}
    for _ in range(options.rounds):
        for run, seconds in times.items():
            started = time.perf_counter()
            assert run() == expected
            seconds.append(time.perf_counter() - started)
    alone, batched = (statistics.median(seconds) for seconds in times.values())
    lengths = sorted(map(len, expected.values()))
    tokens = sum(lengths)
    print(
        f"{name}: {options.prompts} prompts, answers of {lengths[0]} to {lengths[-1]} "
        f"tokens (median {lengths[len(lengths) // 2]}): one by one {alone:.2f} s "
        f"({tokens / alone:.0f} tokens/s), {options.batch_size} together "
        f"{batched:.2f} s ({tokens / batched:.0f} tokens/s), ratio "
        f"{alone / batched:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--only", default="demo,270M")
    options = parser.parse_args()
    if "demo" in options.only:
        model, tokenizer = mlx_openelm.load("demo")
        sampling = Sampling(max_tokens=128, stop=("\n\n",))
        words = tokenizer.encode(TEXT, bos=False)
        compare("demo", model, tokenizer, words, sampling, options)
    if "270M" in options.only:
        model = OpenELM(OpenELMConfig.preset("270M", vocab_size=32128))
        sampling = Sampling(max_tokens=64, stop=("q",), stop_loops=3)
        compare("270M", model, Letters(), range(3, 32000), sampling, options)


if __name__ == "__main__":
    main()
