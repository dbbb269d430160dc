"""A base is known again by its sketch: itself, its roundings, and other models."""

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
    sketch_base,
    sketch_distance,
)


def distance(one, other):
    return sketch_distance(sketch_base(one), base_weights(other))


@pytest.mark.parametrize("config", [UNEVEN, SCALED])
def test_a_base_is_nothing_away_from_itself_and_far_from_others(config):
    base, other = build(config), build(config, seed=5)
    assert distance(base, build(config)) == 0.0
    assert distance(base, other) > OTHER + 0.3
    for model in (base, other):  # what they have in common says nothing
        model.apply(mx.ones_like, lambda module, name, value: "norm" in name)
    assert distance(base, other) > OTHER + 0.3


def test_rounding_moves_it_the_more_the_fewer_the_bits():
    base = build(SCALED)
    found = []
    for dtype in (mx.float16, mx.bfloat16):
        model = build(SCALED)
        model.set_dtype(dtype)
        found.append(distance(base, model))
    for bits in (8, 4, 3, 2):
        model = build(SCALED)
        nn.quantize(model, group_size=64, bits=bits)
        found.append(distance(base, model))
    assert found == sorted(found)
    assert found[0] < SAME < found[1]
    assert found[-1] < OTHER - 0.3


def test_a_packed_base_is_what_its_numbers_are():
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
    assert sketch_base(adapted) == sketch_base(base)


def test_a_sketch_is_small_and_every_matrix_counts_the_same():
    def build_one_large():
        model = build(UNEVEN)
        model.layers[0].ffn.proj_1.weight *= 100
        return model

    base = build_one_large()
    assert len(sketch_base(base)) < 800
    for path, weight in base_weights(base).items():
        model = build_one_large()
        module = dict(model.named_modules())[path]
        module.weight = mx.random.normal(weight.shape, key=mx.random.key(1))
        assert distance(base, model) > 0.2, path


def test_rows_that_pad_a_vocabulary_do_not_count():
    cut = OpenELM(replace(UNEVEN, vocab_size=32000))
    padded = OpenELM(replace(UNEVEN, vocab_size=32128))
    padded.update(cut.parameters())
    rows = mx.zeros((128, UNEVEN.model_dim))
    table = padded.transformer.token_embeddings
    table.weight = mx.concatenate([cut.transformer.token_embeddings.weight, rows])
    assert distance(cut, padded) == 0.0


def test_a_person_is_told_what_was_found(tmp_path):
    base, packed = build(SCALED), build(SCALED)
    nn.quantize(packed, group_size=64, bits=4)
    sketch = sketch_base(base)

    def check(model):
        return check_base(sketch, base_weights(model), tmp_path / "a", "org/base")

    assert check(base) == ()
    (note,) = check(packed)
    assert "another version of this base, org/base" in note
    for other in (build(SCALED, seed=5), build(UNEVEN)):
        with pytest.raises(OpenELMError, match=r"another base.* own base, org/base\.$"):
            check(other)


@pytest.mark.parametrize("sketch", ["AAA", "é", "", "AAAA", "//8=", "AAAAAA==", "AHw="])
def test_a_damaged_sketch_is_said(tmp_path, sketch):
    with pytest.raises(OpenELMError, match=r"sketch .* is damaged .*\.$"):
        check_base(sketch, base_weights(build(UNEVEN)), tmp_path, None)
