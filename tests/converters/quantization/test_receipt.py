"""The receipt, compared with two whole models and float64 formulas in numpy."""

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from models import TEXT, UNEVEN, small_tokenizer, weights_of

from converters.quantization import receipt as module
from converters.quantization.calibration import (
    SAMPLE_NAME,
    calibration_windows,
    read_calibration,
)
from converters.quantization.receipt import Receipt, measure_quantization
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.packed_weights import pack_weight, unpack_weight
from mlx_openelm.model.quantization import Packing
from mlx_openelm.tensor_names import to_folder

UNTIED = replace(UNEVEN, share_input_output_layers=False)


def some_windows(count: int = 3, length: int = 33) -> mx.array:
    return mx.random.randint(3, 300, (count, length), key=mx.random.key(0))


def originals(config: OpenELMConfig) -> dict[str, mx.array]:
    return {n: mx.array(w) for n, w in weights_of(config).items()}


def quantized(weights: dict[str, mx.array], bits: int = 4) -> dict[str, mx.array]:
    packing = Packing(bits, 32)
    return {
        name: unpack_weight(packing, pack_weight(packing, w), mx.float32)
        if w.ndim == 2
        else w
        for name, w in weights.items()
    }


def receipt_of(
    config: OpenELMConfig,
    before: dict[str, mx.array],
    after: dict[str, mx.array],
) -> Receipt:
    return measure_quantization(
        config,
        before.__getitem__,
        after.__getitem__,
        some_windows(),
        text="a test",
        bits_per_weight=5.0,
    )


def log_probabilities(config: OpenELMConfig, weights: dict, inputs: mx.array):
    """Return the whole model's log-probabilities, in float64 from the logits on."""
    model = OpenELM(config)
    model.load_weights([(to_folder(n), w) for n, w in weights.items()])
    logits = np.array(model(inputs)).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("config", [UNEVEN, UNTIED], ids=["tied", "untied"])
def test_the_receipt_equals_that_of_whole_models(config):
    before, windows = originals(config), some_windows()
    after = quantized(before)
    p = log_probabilities(config, before, windows[:, :-1])
    q = log_probabilities(config, after, windows[:, :-1])
    targets = np.array(windows)[:, 1:, None]
    kl = (np.exp(p) * (p - q)).sum(axis=-1)

    receipt = receipt_of(config, before, after)

    assert receipt.tokens == kl.size == 96
    assert receipt.mean_kl == pytest.approx(kl.mean(), rel=1e-4)
    assert receipt.p99_kl == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    agreement = (p.argmax(axis=-1) == q.argmax(axis=-1)).mean()
    assert receipt.top1_agreement == pytest.approx(agreement, abs=1e-9)
    assert 0 < agreement < 1
    for log_p, perplexity in (
        (p, receipt.perplexity_before),
        (q, receipt.perplexity_after),
    ):
        nats = -np.take_along_axis(log_p, targets, axis=-1).mean()
        assert perplexity == pytest.approx(math.exp(nats), rel=1e-5)
    assert (receipt.text, receipt.bits_per_weight) == ("a test", 5.0)


def test_equal_weights_have_no_error():
    weights = originals(UNEVEN)
    receipt = receipt_of(UNEVEN, weights, weights)
    assert (receipt.mean_kl, receipt.p99_kl, receipt.top1_agreement) == (0, 0, 1)
    assert receipt.perplexity_before == receipt.perplexity_after


def test_fewer_bits_have_a_larger_error():
    weights = originals(UNEVEN)
    costs = [
        receipt_of(UNEVEN, weights, quantized(weights, bits)).mean_kl
        for bits in (8, 6, 4, 3, 2)
    ]
    assert costs == sorted(costs)
    assert costs[0] > 0


def test_the_result_does_not_depend_on_the_chunk_size(monkeypatch):
    before = originals(UNEVEN)
    after = quantized(before)
    whole = dataclasses.asdict(receipt_of(UNEVEN, before, after))
    monkeypatch.setattr(module, "CHUNK", 7)
    parts = dataclasses.asdict(receipt_of(UNEVEN, before, after))
    for key in ("mean_kl", "p99_kl", "perplexity_before", "perplexity_after"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-4)
    assert parts["top1_agreement"] == whole["top1_agreement"]


def test_16_bit_weights_are_measured_in_float32():
    halves = {n: w.astype(mx.bfloat16) for n, w in originals(UNEVEN).items()}
    widened = {n: w.astype(mx.float32) for n, w in halves.items()}
    assert receipt_of(UNEVEN, halves, widened).mean_kl == 0


def test_weights_are_read_layer_by_layer():
    weights, order = originals(UNEVEN), []

    def read(name: str) -> mx.array:
        order.append(name)
        return weights[name]

    measure_quantization(UNEVEN, read, read, some_windows(), text="", bits_per_weight=4)
    layers = [int(n.split(".")[1]) for n in order if n.startswith("layers.")]
    assert layers == sorted(layers)
    assert len(layers) == 2 * 8 * 3  # each tensor once a model


def test_progress_is_reported():
    weights, progress = originals(UNEVEN), []
    read = weights.__getitem__
    measure_quantization(
        UNEVEN,
        read,
        read,
        some_windows(),
        text="",
        bits_per_weight=4,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert progress == [(1, 3), (2, 3), (3, 3)]


def test_a_loss_that_is_not_finite_is_refused():
    weights = originals(UNEVEN)
    with_nan = weights | {"norm.weight": weights["norm.weight"] * math.nan}
    with pytest.raises(OpenELMError, match="loss on a test is not finite"):
        receipt_of(UNEVEN, weights, with_nan)


# The text -------------------------------------------------------------------------


def test_the_bundled_sample_is_prose_in_plain_ascii():
    name, text = read_calibration(None)
    assert name == SAMPLE_NAME
    assert 20_000 < len(text) < 50_000
    assert text.isascii()
    assert text.count("\n\n") > 100
    assert "Gutenberg" not in text


def test_a_text_file_is_reported_by_its_file_name(tmp_path: Path):
    path = tmp_path / "own.txt"
    path.write_text("Grüße an alle.", encoding="utf-8")
    assert read_calibration(path) == ("own.txt", "Grüße an alle.")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["missing", "no UTF-8"])
def test_a_missing_or_binary_file_is_refused(tmp_path: Path, content):
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OpenELMError, match=r"own\.txt as UTF-8 text.*`calibration`"):
        read_calibration(path)


def test_windows_are_spread_over_the_text_and_start_with_bos():
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(TEXT, bos=False)
    windows = calibration_windows(tokenizer, TEXT, UNEVEN, num_tokens=64, window=16)
    step = len(ids) // 4
    assert windows.tolist() == [
        [tokenizer.bos_id, *ids[i * step : i * step + 16]] for i in range(4)
    ]
    assert windows.tolist()[-1][-1] in ids[-step:]


def test_a_window_fits_the_context():
    windows = calibration_windows(small_tokenizer(), TEXT, UNEVEN, num_tokens=128)
    assert windows.shape == (2, 1 + UNEVEN.max_context_length)


def test_a_short_text_gives_only_full_windows():
    tokenizer = small_tokenizer()
    text = TEXT[:100]
    have = len(tokenizer.encode(text, bos=False))
    windows = calibration_windows(tokenizer, text, UNEVEN, num_tokens=999, window=16)
    assert windows.shape == (have // 16, 17)


def test_a_text_below_one_window_is_refused():
    with pytest.raises(OpenELMError, match="has 2 tokens, but needs at least 64"):
        calibration_windows(small_tokenizer(), "e", UNEVEN, num_tokens=64)
