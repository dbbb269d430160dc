"""A receipt says what two whole models, side by side, would say."""

import mlx.core as mx
import numpy as np
import pytest
from commands import call, refuse
from models import TEXT, UNEVEN, build, small_tokenizer, weights_of

from converters.calibration import calibration_windows, read_calibration
from converters.receipt import measure
from mlx_openelm.checkpoint import open_folder
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.names import to_folder
from mlx_openelm.quantize import Packing

WEIGHTS = {name: mx.array(w) for name, w in weights_of(UNEVEN).items()}
WINDOWS = calibration_windows(
    small_tokenizer(), TEXT, UNEVEN, num_tokens=160, window=40
)


def quantized(weights: dict, bits: int) -> dict:
    packing = Packing(bits, 32)
    return {
        name: packing.unpack(packing.pack(w), mx.float32) if w.ndim == 2 else w
        for name, w in weights.items()
    }


def score(before: dict, after: dict, config: OpenELMConfig = UNEVEN, **options):
    return measure(
        config, before.get, after.get, WINDOWS, text="a text", bits_per_weight=4.5,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_the_figures_are_those_of_whole_models(tied):
    config = OpenELMConfig(
        **{f: getattr(UNEVEN, f) for f in UNEVEN.__slots__}
        | {"share_input_output_layers": tied}
    )
    weights = {name: mx.array(w) for name, w in weights_of(config).items()}
    rounded = quantized(weights, 4)
    found = score(weights, rounded, config)
    model, log_ps = build(config), []
    for chosen in (weights, rounded):
        model.load_weights([(to_folder(n), w) for n, w in chosen.items()])
        logits = np.array(model(WINDOWS[:, :-1])).astype(np.float64)
        log_ps.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    p, q = log_ps
    kl = (np.exp(p) * (p - q)).sum(-1).reshape(-1)
    targets = np.array(WINDOWS[:, 1:])[..., None]
    assert (found.tokens, found.text, found.bits_per_weight) == (160, "a text", 4.5)
    assert found.mean_kl == pytest.approx(kl.mean(), rel=1e-3)
    assert found.p99_kl == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert found.top1_agreement == (p.argmax(-1) == q.argmax(-1)).mean()
    for name, log_p in (("before", p), ("after", q)):
        nats = -np.take_along_axis(log_p, targets, axis=-1).mean()
        assert getattr(found, f"perplexity_{name}") == pytest.approx(
            np.exp(nats), rel=1e-4
        )


def test_a_model_loses_nothing_against_itself():
    found = score(WEIGHTS, WEIGHTS)
    assert found.mean_kl == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1
    assert found.perplexity_before == found.perplexity_after


def test_fewer_bits_lose_more():
    losses = [score(WEIGHTS, quantized(WEIGHTS, bits)).mean_kl for bits in (2, 4, 8)]
    assert losses[0] > 4 * losses[1] > 16 * losses[2] > 0


def test_the_size_of_the_chunks_changes_nothing():
    rounded = quantized(WEIGHTS, 3)
    whole = score(WEIGHTS, rounded, chunk=1000)
    assert score(WEIGHTS, rounded, chunk=7).mean_kl == pytest.approx(whole.mean_kl)


def test_windows_begin_with_bos_and_come_from_all_over_the_text():
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(TEXT, bos=False)
    assert WINDOWS.shape == (4, 41)
    assert (np.array(WINDOWS[:, 0]) == tokenizer.bos_id).all()
    starts = [i * (len(ids) // 4) for i in range(4)]
    assert np.array(WINDOWS[:, 1:]).tolist() == [ids[s : s + 40] for s in starts]


def test_the_bundled_sample_is_prose_and_enough_of_it():
    name, text = read_calibration(None)
    assert "sample" in name
    assert len(text.split()) > 4096


def test_convert_writes_the_receipt_and_inspect_shows_it(here):
    flags = ("--q-bits", "4", "--q-group-size", "32")
    (here / "mine.txt").write_text(TEXT)
    ran = call("convert", "source", *flags, "--calibration", "mine.txt")
    assert (ran.exit_code, ran.stdout) == (0, "source-mlx-4bit\n")
    assert "Receipt: mean KL" in ran.stderr
    assert "mine.txt" in ran.stderr
    receipt = open_folder(here / "source-mlx-4bit").metadata["receipt"]
    assert 0 < receipt["mean_kl"] < receipt["p99_kl"]
    assert "mean KL" in call("inspect", "source-mlx-4bit").stdout
    ran = call("convert", "source", *flags, "--no-receipt", "--mlx-path", "bare")
    assert "Receipt" not in ran.stderr
    assert "receipt" not in open_folder(here / "bare").metadata
    ran = call("convert", "source", *flags, "--tokenizer", "none", "--mlx-path", "mute")
    assert "No receipt: without a tokenizer" in ran.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "Cannot read mine.txt"),
        (b"\xff\xfe", "as UTF-8 text"),
        (b"short", "calibration text has"),
    ],
)
def test_a_text_that_cannot_be_scored_is_refused_before_the_work(here, content, says):
    if content is not None:
        (here / "mine.txt").write_bytes(content)
    flags = ("--q-bits", "4", "--q-group-size", "32", "--calibration", "mine.txt")
    refuse(here, "convert", "source", *flags, says=says)
