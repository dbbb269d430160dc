"""Speed of speculative decoding relative to plain decoding, by acceptance rate.

    python benchmarks/speculation.py [--tokens 128] [--rounds 3] [--text FILE]

A fixed text is replayed: each step runs the 270M model (synthetic weights, float32),
but a bias forces the text's next token, in plain decoding as well. The drafter drafts
these tokens, four at a time, each one wrong with a given probability. The runs
alternate; each is compared with the preceding plain run, and the median of these ratios
is printed. The draft length is chosen from measured times, as in normal use.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core

import mlx.core as mx  # isort: skip

from mlx_openelm.bench.selfcheck import made_weight
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.generation.cache import ModelCache
from mlx_openelm.generation.decoding import Sampler, draw_tokens
from mlx_openelm.generation.drafters import Draft, Drafter
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.speculation import draw_speculatively
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.hub import demo_folder
from mlx_openelm.storage.loading import load_tokenizer
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.tensor_names import to_folder

PROMPT_TOKENS, LENGTH = 64, 4
RATES = (0.0, 0.2, 0.5, 0.7, 0.87, 0.95, 1.0)


class Forced:
    """A model that computes everything, but forces the tokens of a text."""

    def __init__(self, model: OpenELM, text: Sequence[int]) -> None:
        self.config, self.layers = model.config, model.layers
        self._model, self._text, self._position = model, text, 0

    def transformer(self, tokens: mx.array, cache: list[ModelCache]) -> mx.array:
        hidden = self._model.transformer(tokens, cache)
        self._position = cache[0].offset
        return hidden

    def head(self, hidden: mx.array) -> mx.array:
        rows = hidden.shape[0]
        following = self._text[self._position - rows + 1 : self._position + 1]
        logits = self._model.head(hidden)
        return logits.at[mx.arange(rows), mx.array(following)].add(1e6)


class Replay(Drafter):
    """Drafts the tokens of the text, some replaced by wrong ones."""

    is_free = True

    def __init__(self, text: Sequence[int], rate: float, seed: int) -> None:
        super().__init__(LENGTH, "length")
        rng = random.Random(seed)
        self._drafted = [t if rng.random() < rate else t ^ 1 for t in text]

    def begin(self, prompt: Sequence[int]) -> None:
        """Do nothing: the text is fixed."""

    def peek(self, text: Sequence[int]) -> int:
        return self._drafted[len(text)]

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> Draft:
        return Draft(mx.array(self._drafted[len(text) : len(text) + count]))


def make_model() -> OpenELM:
    """Return the 270M model with synthetic weights."""
    config = OpenELMConfig.preset("270M")
    model = OpenELM(config)
    shapes = config.tensor_shapes().items()
    model.load_weights(
        [(to_folder(name), mx.array(made_weight(name, s, 7))) for name, s in shapes]
    )
    mx.eval(model.parameters())
    return model


def time_tokens(
    model: Forced, text: Sequence[int], count: int, drafter: Drafter | None
) -> float:
    """Return the tokens per second after the first one."""
    prompt = text[:PROMPT_TOKENS]
    drawn = (
        draw_tokens(model, prompt, Sampling(), count)
        if drafter is None
        else draw_speculatively(model, prompt, Sampling(), count, drafter)
    )
    tokens = [next(drawn).id]
    started = time.perf_counter()
    tokens += [token.id for token in drawn]
    elapsed = time.perf_counter() - started
    assert tokens == text[PROMPT_TOKENS : PROMPT_TOKENS + count]
    return (count - 1) / elapsed


def main() -> None:
    """Print a line for each rate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, default=Path("README.md"))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    options = parser.parse_args()
    tokenizer = load_tokenizer(open_folder(demo_folder()))
    text = tokenizer.encode(options.text.read_text(encoding="utf-8"))
    if len(text) < PROMPT_TOKENS + options.tokens + 1:
        parser.error(f"{options.text} has only {len(text)} tokens.")
    model = Forced(make_model(), text)
    time_tokens(model, text, 8, None)  # warm-up
    ratios: dict[float, list[float]] = {rate: [] for rate in options.rates}
    shares: dict[float, list[float]] = {rate: [] for rate in options.rates}
    plain = []
    for round in range(options.rounds):
        for rate in options.rates:
            plain.append(time_tokens(model, text, options.tokens, None))
            drafter = Replay(text, rate, round)
            speed = time_tokens(model, text, options.tokens, drafter)
            ratios[rate].append(speed / plain[-1])
            shares[rate].append(drafter.accepted / max(drafter.drafted, 1))
    print(f"plain: {statistics.median(plain):.1f} tokens/s, {options.tokens} tokens")
    print("right draft tokens | accepted draft tokens | speed over plain (least, most)")
    for rate, speeds in ratios.items():
        print(
            f"{rate:18.0%} | {statistics.median(shares[rate]):21.0%} | "
            f"{statistics.median(speeds):.2f} ({min(speeds):.2f}, {max(speeds):.2f})"
        )


if __name__ == "__main__":
    main()
