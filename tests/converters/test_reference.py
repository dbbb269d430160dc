"""The PyTorch reference, compared with Apple's logits and with MLX."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from models import UNEVEN, build, read_golden, weights_of, write_pt

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core

torch = pytest.importorskip("torch", reason="needs PyTorch")

from converters.formats.sources import open_source  # noqa: E402
from converters.parity import compare_with_reference  # noqa: E402
from converters.pretraining.plan import count_flops_per_token  # noqa: E402
from converters.reference import (  # noqa: E402
    GrowingCache,
    ReferenceOpenELM,
    summed_loss,
)
from mlx_openelm.bench.selfcheck import made_weight  # noqa: E402
from mlx_openelm.config import OpenELMConfig  # noqa: E402
from mlx_openelm.model import openelm  # noqa: E402
from mlx_openelm.model.likelihood import log_likelihoods  # noqa: E402
from mlx_openelm.model.openelm import OpenELM  # noqa: E402
from mlx_openelm.tensor_names import to_folder  # noqa: E402

TOKENS = np.random.default_rng(3).integers(0, UNEVEN.vocab_size, size=(2, 33))


def reference(config, weights=None):
    model = ReferenceOpenELM(config)
    state = {n: torch.from_numpy(w) for n, w in (weights or weights_of(config)).items()}
    model.load_state_dict(state)
    return model


def test_the_state_dict_has_corenets_names_and_order():
    _, shapes, *_ = read_golden("OpenELM-270M")
    with torch.device("meta"):
        model = ReferenceOpenELM(OpenELMConfig.preset("270M", vocab_size=32128))
    assert [(n, tuple(t.shape)) for n, t in model.state_dict().items()] == list(
        shapes.items()
    )


@pytest.mark.parametrize(
    "case", ["gpt-test", pytest.param("OpenELM-270M", marks=pytest.mark.proof)]
)
def test_the_reference_reproduces_apples_logits(case):
    metadata, shapes, tokens, positions, logits = read_golden(case)
    seed = int(metadata["seed"])
    weights = {n: made_weight(n, s, seed) for n, s in shapes.items()}
    model = reference(OpenELMConfig.from_shapes(shapes), weights)
    with torch.no_grad():
        actual = model(torch.from_numpy(tokens).long()).numpy()[:, positions]
    assert np.abs(actual - logits).max() <= 1e-4
    assert (actual.argmax(-1) == logits.argmax(-1)).all()


def test_weights_are_initialised_as_in_corenet():
    config = OpenELMConfig.scaled(
        num_layers=4, model_dim=256, head_dim=64, vocab_size=2000
    )
    torch.manual_seed(0)
    for name, drawn in ReferenceOpenELM(config).state_dict().items():
        if name.endswith("norm.weight"):
            assert (drawn == 1).all()
            continue
        expected = 256**-0.5 if "embeddings" in name else drawn.shape[1] ** -0.5
        if name.endswith(("out_proj.weight", "proj_2.weight")):
            expected = 256**-0.5 * (2 * 4) ** -0.5
        assert drawn.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(drawn.mean().item()) < 0.1 * expected


def test_the_cache_gives_the_uncached_logits():
    model, tokens = reference(UNEVEN), torch.from_numpy(TOKENS)
    with torch.no_grad():
        whole = model(tokens)
        cache = GrowingCache()
        parts = [model(tokens[:, a:b], cache) for a, b in ((0, 7), (7, 8), (8, 33))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_every_layer_agrees_through_the_converter(tmp_path, tied):
    config = replace(UNEVEN, share_input_output_layers=tied)
    path = write_pt(tmp_path / "uneven.pt", weights_of(config))
    report = compare_with_reference(str(path))
    assert report.equal
    assert [p.place for p in report.places] == [
        "embedding",
        *(f"layer {i}" for i in range(3)),
        "final norm",
        "logits",
    ]
    for place in report.places:
        assert place.difference <= 1e-4 * max(1.0, place.largest), place
        assert place.largest > 0


def test_a_difference_is_reported(tmp_path, monkeypatch):
    path = write_pt(tmp_path / "uneven.pt", weights_of(UNEVEN))
    monkeypatch.setattr(openelm, "swiglu", lambda gate, up: up)
    report = compare_with_reference(str(path))
    assert not report.equal
    assert report.places[0].difference == 0
    assert report.places[1].difference > 1e-3


def test_loss_and_gradients_agree_through_the_converter(tmp_path):
    source = open_source(str(write_pt(tmp_path / "uneven.pt", weights_of(UNEVEN))))
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:].copy()

    theirs = reference(UNEVEN)
    loss, _ = summed_loss(theirs(torch.from_numpy(inputs)), torch.from_numpy(targets))
    (loss / targets.size).backward()

    ours = OpenELM(UNEVEN)
    ours.load_weights([(to_folder(n), t.read()) for n, t in source.tensors.items()])

    def loss_of(model):
        logits = model(mx.array(inputs))
        return nn.losses.cross_entropy(logits, mx.array(targets), reduction="mean")

    value, gradients = nn.value_and_grad(ours, loss_of)(ours)
    assert value.item() == pytest.approx(loss.item() / targets.size, rel=1e-5)
    scored = log_likelihoods(ours, mx.array(inputs), mx.array(targets), chunk=7)
    assert -scored.mean().item() == pytest.approx(value.item(), rel=1e-5)
    by_name = dict(tree_flatten(gradients))
    for name, parameter in theirs.named_parameters():
        expected = parameter.grad.numpy()
        difference = np.abs(np.array(by_name[to_folder(name)]) - expected).max()
        assert difference <= 1e-4 * np.abs(expected).max(), name
    assert len(by_name) == len(UNEVEN.tensor_shapes())


def test_z_loss_and_ignored_targets():
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(1))
    targets = torch.randint(0, 11, (2, 5))
    targets[0, 3:] = -100
    loss, objective = summed_loss(logits, targets, z_loss=0.5)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )
    squares = torch.logsumexp(logits, -1).square()[targets != -100].sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(objective, expected + 0.5 * squares)


def test_flops_count_each_matrix_six_times():
    config = build(UNEVEN).config
    matrices = sum(
        a * b for a, b in (s for s in config.tensor_shapes().values() if len(s) == 2)
    )
    assert count_flops_per_token(config, 0) == 6 * matrices
    assert count_flops_per_token(config, 64) == 6 * matrices + 12 * 12 * 16 * 32
