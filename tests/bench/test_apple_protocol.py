"""`bench --protocol apple`: the workload of CoreNet's benchmark."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest
from commands import call, expect_error

from mlx_openelm.bench import apple_protocol, machine
from mlx_openelm.bench.apple_protocol import (
    Timing,
    apple_form,
    plan_apple_cases,
    time_call,
)
from mlx_openelm.bench.machine import Bandwidth
from mlx_openelm.bench.models import make_model
from mlx_openelm.bench.plan import Subject, make_subject
from mlx_openelm.bench.published_speeds import PUBLISHED
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.generation.decoding import draw_tokens
from mlx_openelm.generation.options import Sampling


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch):
    small = Bandwidth(1e9, "a sum", {"a sum": 1e9}, 1000, 5)
    monkeypatch.setattr(machine, "measure_bandwidth", lambda: small)


@pytest.fixture
def small(monkeypatch):
    """A model of one layer under the name of the 270M, and 20 new tokens."""

    def make(size):
        config = replace(OpenELMConfig.preset("gpt-test"), vocab_size=300)
        return Subject(make_subject(size).name, config)

    monkeypatch.setattr(apple_protocol, "make_subject", make)
    monkeypatch.setattr(apple_protocol, "NEW_TOKENS", 20)


# What is measured ----------------------------------------------------------------


def test_the_cases_are_those_of_the_published_table():
    cases = plan_apple_cases((), ())
    sizes = {
        case.subject.name.removeprefix("OpenELM-").replace("_", ".") for case in cases
    }
    published = {(p.size, p.bits) for p in PUBLISHED}
    assert sizes == {size for size, _ in published}
    assert len(cases) == len(published) == 8
    for case in cases:
        assert (case.prompt_tokens, case.new_tokens, case.batch) == (36, 1024, 1)
        assert case.subject.config.vocab_size == 32128


def test_the_weights_are_those_of_apples_script(monkeypatch):
    """float16 (3B bfloat16); 4 bits in groups of 64, embedding and norms in 16 bits."""
    monkeypatch.setattr(apple_protocol, "compute_dtype", lambda stored: stored)
    expected_mb = {"270M": (543.4, 212.0), "3B": (6074.1, 1850.5)}  # facts, 5.2
    for size, megabytes in expected_mb.items():
        config = replace(OpenELMConfig.preset(size), vocab_size=32128)
        for bits, expected in zip((16, 4), megabytes, strict=True):
            name, form = apple_form(config, bits)
            assert name == ("bfloat16" if size == "3B" else "float16")
            assert "token_embeddings.weight" not in form.packings
            count = 0
            for tensor, shape in config.tensor_shapes().items():
                packing = form.packings.get(tensor)
                weights = shape[0] * (shape[1] if len(shape) == 2 else 1)
                bytes_each = form.dtype.size
                if packing is not None:
                    assert (packing.bits, packing.group_size) == (4, 64)
                    bytes_each = 4 / 8 + 2 * form.dtype.size / 64
                count += weights * bytes_each
            assert count / 1e6 == pytest.approx(expected, abs=0.06)


def test_rates_follow_the_published_formulas():
    """Table 7, 270M in 16 bits: 1151.41, 212.40 and 218.45 tokens per second."""
    first = 36 / 1151.41
    timing = Timing(first, first + 1024 / 212.40, 36, 1024)
    assert timing.prompt_tps == pytest.approx(1151.41)
    assert timing.generation_tps == pytest.approx(212.40)
    assert timing.total_tps == pytest.approx(218.45, abs=0.005)


def test_the_tokens_are_greedy_and_evaluated_eight_together(monkeypatch):
    config = replace(OpenELMConfig.preset("gpt-test"), vocab_size=300)
    model = make_model(config, apple_form(config, 16)[1])
    ids = [1, *(3 + 7919 * n % 297 for n in range(35))]
    expected = [t.id for t in draw_tokens(model, ids, Sampling(), 20)]
    drawn, together = [], []
    evaluate = mx.eval

    def watch(*arrays):
        evaluate(*arrays)
        if isinstance(arrays[0], list):
            together.append(len(arrays[0]))
            drawn.extend(token.item() for token in arrays[0])
        elif isinstance(arrays[0], mx.array) and arrays[0].shape == (1,):
            drawn.append(arrays[0].item())

    monkeypatch.setattr(mx, "eval", watch)
    timing = time_call(model, 36, 20)
    assert drawn == expected
    assert together == [8, 8, 3]
    assert timing.new_tokens == 20
    assert 0 < timing.first < timing.whole


# The command ---------------------------------------------------------------------


def test_published_figures_stand_beside_ours(small):
    args = ("bench", "--protocol", "apple", "--size", "270M", "--rounds", "2")
    result = call(*args)
    assert result.exit_code == 0, (result.stderr, result.exception)
    words = " ".join(result.stdout.split())
    assert "total" in words
    assert "1,151 212 218" in words
    assert "quoted from memory, UNVERIFIED" in words
    assert "M2 Max" in words
    report = json.loads(call(*args, "--json").stdout)
    assert report["protocol"] == "apple"
    first = report["cells"][0]
    assert first["prompt_tps"]["low"] == first["prompt_tps"]["high"]  # the cold call
    assert first["total_tps"]["median"] > 0
    assert first["published"]["total_tps"] == 218.45
    assert not first["published"]["verified"]
    assert [cell["bits"] for cell in report["cells"]] == [16, 4]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--protocol", "other"), "choose apple, or leave it out"),
        (("--protocol", "apple", "--bits", "8"), "has 16 and 4"),
        (("--protocol", "apple", "--model", "demo"), "leave out --model"),
        (("--protocol", "apple", "--prompt-tokens", "9"), "leave out --prompt-tokens"),
        (("--protocol", "apple", "-m", "9"), "leave out --max-tokens"),
        (("--protocol", "apple", "--batch", "2"), "leave out --batch"),
        (("--protocol", "apple", "--against", "mlx-lm"), "leave out --against"),
    ],
)
def test_options_of_another_workload_are_refused(tmp_path, args, message):
    expect_error(tmp_path, "bench", *args, message=message)
