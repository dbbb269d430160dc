"""How fast a text is decoded when its next tokens are guessed, beside plain decoding.

    python benchmarks/speculation.py [--tokens 128] [--rounds 3] [--text FILE]

A fixed text is replayed: the real step of the 270M runs (made weights, float32), but
its logits are pushed to the text's own next token. A drafter guesses just these tokens,
each one wrong with a given probability, four at a time. Plain decoding pushes its
logits as well. The runs alternate, and each one is compared with the plain run beside
it: the median of these ratios is printed. How many tokens are guessed, and whether at
all, is decided by the clock, as always.
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
from mlx_openelm.generation.decoding import Drawing, draw_tokens
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
    """A model that computes everything, and then says what stands in the text."""

    def __init__(self, model: OpenELM, text: Sequence[int]) -> None:
        self.config, self.layers = model.config, model.layers
        self._model, self._text, self._seen = model, text, 0

    def transformer(self, tokens: mx.array, cache: list[ModelCache]) -> mx.array:
        hidden = self._model.transformer(tokens, cache)
        self._seen = cache[0].offset
        return hidden

    def head(self, hidden: mx.array) -> mx.array:
        rows = hidden.shape[0]
        following = self._text[self._seen - rows + 1 : self._seen + 1]
        logits = self._model.head(hidden)
        return logits.at[mx.arange(rows), mx.array(following)].add(1e6)


class Replay(Drafter):
    """Guesses the text's own next tokens, and some wrong ones among them."""

    is_free = True

    def __init__(self, text: Sequence[int], rate: float, seed: int) -> None:
        super().__init__(LENGTH, "length")
        rng = random.Random(seed)
        self._guesses = [t if rng.random() < rate else t ^ 1 for t in text]

    def begin(self, prompt: Sequence[int]) -> None:
        """There is nothing to be read."""

    def expect(self, text: Sequence[int]) -> int:
        return self._guesses[len(text)]

    def propose(self, text: Sequence[int], count: int, drawing: Drawing) -> Draft:
        return Draft(mx.array(self._guesses[len(text) : len(text) + count]))


def make_model() -> OpenELM:
    """Return the 270M in made weights."""
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
    found = [next(drawn).id]
    started = time.perf_counter()
    found += [token.id for token in drawn]
    elapsed = time.perf_counter() - started
    assert found == text[PROMPT_TOKENS : PROMPT_TOKENS + count]
    return (count - 1) / elapsed


def main() -> None:
    """Print one line for every rate."""
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
            found = time_tokens(model, text, options.tokens, drafter)
            ratios[rate].append(found / plain[-1])
            shares[rate].append(drafter.accepted / max(drafter.drafted, 1))
    print(f"plain: {statistics.median(plain):.1f} tokens/s, {options.tokens} tokens")
    print(
        "a guess is right | of the drafted, accepted | speed over plain (least, most)"
    )
    for rate, found in ratios.items():
        print(
            f"{rate:13.0%} | {statistics.median(shares[rate]):23.0%} | "
            f"{statistics.median(found):.2f} ({min(found):.2f}, {max(found):.2f})"
        )


if __name__ == "__main__":
    main()
