"""The fingerprint of a base: the same model, rounded ones, and other models."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from models import SCALED, UNEVEN, build

from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.adapter_folder import wrap
from mlx_openelm.storage.base_check import (
    OTHER,
    SAME,
    base_weights,
    check_base,
    fingerprint_base,
    fingerprint_distance,
)


def distance(one, other):
    return fingerprint_distance(fingerprint_base(one), base_weights(other))


@pytest.mark.parametrize("config", [UNEVEN, SCALED])
def test_the_distance_is_0_to_the_same_base_and_large_to_others(config):
    base, other = build(config), build(config, seed=5)
    assert distance(base, build(config)) == 0.0
    assert distance(base, other) > OTHER + 0.3
    for model in (base, other):  # equal norms do not count
        model.apply(mx.ones_like, lambda module, name, value: "norm" in name)
    assert distance(base, other) > OTHER + 0.3


def test_the_distance_grows_with_coarser_rounding():
    base = build(SCALED)
    distances = []
    for dtype in (mx.float16, mx.bfloat16):
        model = build(SCALED)
        model.set_dtype(dtype)
        distances.append(distance(base, model))
    for bits in (8, 4, 3, 2):
        model = build(SCALED)
        nn.quantize(model, group_size=64, bits=bits)
        distances.append(distance(base, model))
    assert distances == sorted(distances)
    assert distances[0] < SAME < distances[1]
    assert distances[-1] < OTHER - 0.3


def test_a_quantized_base_has_the_fingerprint_of_its_dequantized_weights():
    packed, plain = build(SCALED), build(SCALED)
    nn.quantize(packed, group_size=64, bits=4)
    for module in packed.modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            parts = (module.weight, module.scales, module.biases)
            rows = mx.dequantize(*parts, group_size=64, bits=4)
            module.unpacked = rows
    weights = {
        f"{path}.weight": module.unpacked
        for path, module in packed.named_modules()
        if "unpacked" in module
    }
    plain.load_weights(list(weights.items()), strict=False)
    assert len(weights) == 13
    assert distance(packed, plain) == 0.0


def test_adapters_are_not_part_of_the_base():
    base, adapted = build(UNEVEN), build(UNEVEN)
    rng = np.random.default_rng(2)
    wrapped = []
    for path, module in adapted.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        rows, width = module.weight.shape
        shapes = ((width, 4), (4, rows))
        if isinstance(module, nn.Embedding):
            shapes = ((rows, 4), (4, width))
        a, b = (mx.array(rng.standard_normal(shape)) for shape in shapes)
        parts = {"lora_a": a, "lora_b": b}
        if path.endswith("qkv_proj"):
            parts["m"] = mx.ones(rows)
        wrapped.append((path, wrap(module, parts, 1.0)))
    adapted.update_modules(tree_unflatten(wrapped))
    assert fingerprint_base(adapted) == fingerprint_base(base)


def test_a_fingerprint_is_small_and_every_matrix_counts_the_same():
    def build_one_large():
        model = build(UNEVEN)
        model.layers[0].ffn.proj_1.weight *= 100
        return model

    base = build_one_large()
    assert len(fingerprint_base(base)) < 800
    for path, weight in base_weights(base).items():
        model = build_one_large()
        module = dict(model.named_modules())[path]
        module.weight = mx.random.normal(weight.shape, key=mx.random.key(1))
        assert distance(base, model) > 0.2, path


def test_padding_rows_of_the_embedding_do_not_count():
    cut = OpenELM(replace(UNEVEN, vocab_size=32000))
    padded = OpenELM(replace(UNEVEN, vocab_size=32128))
    padded.update(cut.parameters())
    rows = mx.zeros((128, UNEVEN.model_dim))
    table = padded.transformer.token_embeddings
    table.weight = mx.concatenate([cut.transformer.token_embeddings.weight, rows])
    assert distance(cut, padded) == 0.0


def test_another_version_gives_a_note_and_another_base_an_error(tmp_path):
    base, packed = build(SCALED), build(SCALED)
    nn.quantize(packed, group_size=64, bits=4)
    fingerprint = fingerprint_base(base)

    def check(model):
        return check_base(fingerprint, base_weights(model), tmp_path / "a", "org/base")

    assert check(base) == ()
    (note,) = check(packed)
    assert "another version of this base, org/base" in note
    for other in (build(SCALED, seed=5), build(UNEVEN)):
        with pytest.raises(OpenELMError, match=r"another base.* own base, org/base\.$"):
            check(other)


@pytest.mark.parametrize(
    "fingerprint", ["AAA", "é", "", "AAAA", "//8=", "AAAAAA==", "AHw="]
)
def test_a_damaged_fingerprint_is_reported(tmp_path, fingerprint):
    with pytest.raises(OpenELMError, match=r"fingerprint .* is damaged .*\.$"):
        check_base(fingerprint, base_weights(build(UNEVEN)), tmp_path, None)
