"""Bit allocation: optimal choices within the requested size."""

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TEXT, UNEVEN, build, small_tokenizer, weights_of

from converters.quantization.allocation import (
    allocate,
    list_choices,
    measure_sensitivities,
    solve_knapsack,
)
from converters.quantization.calibration import calibration_windows, read_calibration
from converters.quantization.receipt import measure_quantization
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.packed_weights import pack_weight, unpack_weight
from mlx_openelm.model.quantization import Packing
from mlx_openelm.storage.hub import demo_folder
from mlx_openelm.storage.loading import load_tokenizer
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.tensor_names import EMBEDDING, to_folder

WEIGHTS = {name: mx.array(w) for name, w in weights_of(UNEVEN).items()}
WINDOWS = calibration_windows(
    small_tokenizer(), TEXT, UNEVEN, num_tokens=128, window=32
)
CHOICES = list_choices(UNEVEN)


def bits_per_weight(config: OpenELMConfig, packings: dict[str, Packing]) -> float:
    total = 0
    for name, shape in config.tensor_shapes().items():
        if name in packings:
            parts = packings[name].part_shapes(shape)
            total += 4 * math.prod(parts.pop("weight"))
            total += sum(2 * math.prod(part) for part in parts.values())
        else:
            total += 2 * math.prod(shape)
    return 8 * total / config.num_parameters


@settings(max_examples=200)
@given(st.data())
def test_the_knapsack_solution_is_optimal(data):
    size = st.integers(1, 30).map(lambda n: 8 * n)
    loss = st.floats(0, 10, width=16)
    items = data.draw(
        st.lists(st.lists(st.tuples(size, loss), min_size=1, max_size=4), min_size=1,
                 max_size=4)
    )  # fmt: skip
    costs = [[cost for cost, _ in item] for item in items]
    losses = [[loss for _, loss in item] for item in items]
    least = sum(map(min, costs))
    budget = data.draw(st.integers(least, least + 400))
    picked = solve_knapsack(costs, losses, budget)
    spent = sum(item[i] for item, i in zip(costs, picked, strict=True))
    loss = sum(item[i] for item, i in zip(losses, picked, strict=True))
    best = min(
        sum(item[i] for item, i in zip(losses, combination, strict=True))
        for combination in itertools.product(*(range(len(item)) for item in items))
        if sum(c[i] for c, i in zip(costs, combination, strict=True)) <= budget
    )
    assert spent <= budget
    assert loss == pytest.approx(best)


def test_costs_without_a_common_divisor_stay_within_the_budget():
    rng = np.random.default_rng(0)
    costs = [sorted(map(int, rng.integers(10**6, 10**7, 6))) for _ in range(20)]
    losses = [[1.0 / (i + 1) for i in range(6)] for _ in range(20)]
    budget = 20 * 4_000_003
    picked = solve_knapsack(costs, losses, budget)
    spent = sum(item[i] for item, i in zip(costs, picked, strict=True))
    assert 0.99 * budget < spent <= budget


@pytest.mark.parametrize("bits", [3.0, 3.5, 4.5, 6.0])
def test_the_folder_has_the_requested_bits(bits):
    chosen = allocate(UNEVEN, WEIGHTS.get, WINDOWS, bits, CHOICES)
    average = bits_per_weight(UNEVEN, chosen)
    assert bits - 0.05 < average <= bits
    assert all(packing in CHOICES[name] for name, packing in chosen.items())


def test_sensitivities_equal_those_of_whole_models():
    model = build(UNEVEN)
    inputs = WINDOWS[:, :-1]

    def log_p():
        logits = np.array(model(inputs)).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    original = log_p()
    probes = {name: Packing(4, 32) for name in CHOICES}
    sensitivities = measure_sensitivities(
        UNEVEN, WEIGHTS.get, WINDOWS, probes, dtype=mx.float32
    )
    assert sensitivities.keys() == CHOICES.keys()
    for name, sensitivity in sensitivities.items():
        packed = unpack_weight(
            probes[name], pack_weight(probes[name], WEIGHTS[name]), mx.float32
        )
        model.load_weights([(to_folder(name), packed)], strict=False)
        varied = log_p()
        model.load_weights([(to_folder(name), WEIGHTS[name])], strict=False)
        kl = (np.exp(original) * (original - varied)).sum(-1).mean()
        assert sensitivity == pytest.approx(kl, rel=1e-3, abs=1e-6), name


def test_a_tensor_that_matters_more_gets_more_bits():
    name = "layers.1.ffn.proj_2.weight"
    plain = allocate(UNEVEN, WEIGHTS.get, WINDOWS, 4.0, CHOICES)
    louder = WEIGHTS | {name: 8 * WEIGHTS[name]}
    chosen = allocate(UNEVEN, louder.get, WINDOWS, 4.0, CHOICES)
    assert chosen[name].bits > plain[name].bits


def test_embed_bits_group_size_and_keep_are_applied():
    choices = list_choices(
        UNEVEN, keeps=lambda n: "out_proj" in n, group_size=32, embed_bits=8
    )
    chosen = allocate(UNEVEN, WEIGHTS.get, WINDOWS, 7.5, choices)
    assert chosen[EMBEDDING] == Packing(8, 32)
    assert not any("out_proj" in name for name in chosen)
    assert {packing.group_size for packing in chosen.values()} == {32}
    with pytest.raises(OpenELMError, match=r"No group size .*layers.0.ffn.proj_2"):
        list_choices(UNEVEN, group_size=64)


@pytest.mark.parametrize("bits", [1.0, 15.9])
def test_unreachable_bits_are_refused_with_the_possible_range(bits):
    with pytest.raises(OpenELMError, match=r"must be auto:2\.\d+ to auto:\d\.\d+\."):
        allocate(UNEVEN, WEIGHTS.get, WINDOWS, bits, CHOICES)


@pytest.mark.proof
@pytest.mark.parametrize("bits", [3, 4])
def test_the_demo_has_a_smaller_error_than_at_uniform_bits(shared, bits):
    """On the held-out books: at most 0.6 of the best uniform setting's mean KL."""
    folder = open_folder(demo_folder())
    config, tokenizer = folder.config, load_tokenizer(folder)
    weights = folder.read()
    _, sample = read_calibration(None)
    texts = sorted(
        (shared / "data" / "stories" / "text").glob("*princess-and-curdie.txt")
    )
    held_out = texts[0].read_text()[50_000:150_000]
    unseen = calibration_windows(tokenizer, held_out, config, num_tokens=4096)
    windows = calibration_windows(tokenizer, sample, config, num_tokens=4096)

    def read(name):
        return weights[to_folder(name)]

    def mean_kl(packings):
        def packed(name):
            packing, weight = packings.get(name), read(name)
            if packing is None:
                return weight
            return unpack_weight(packing, pack_weight(packing, weight), mx.float32)

        return measure_quantization(
            config, read, packed, unseen, text="", bits_per_weight=0.0
        ).mean_kl

    linears = [n for n, s in config.tensor_shapes().items() if len(s) == 2]
    uniform = {
        embed: {n: Packing(embed if n == EMBEDDING else bits, 64) for n in linears}
        for embed in (4, 5, 6, 8)
    }
    losses = {embed: mean_kl(packings) for embed, packings in uniform.items()}
    best = min(losses, key=losses.__getitem__)
    budget = bits_per_weight(config, uniform[best])
    chosen = allocate(config, read, windows, budget, list_choices(config))
    assert bits_per_weight(config, chosen) <= budget
    assert mean_kl(chosen) <= 0.6 * losses[best]
