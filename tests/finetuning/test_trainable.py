"""Trainable weights and adapters, and how mlx-lm reads them."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from models import SCALED, UNEVEN, build, small_tokenizer, weights_of
from models import write_hugging_face as write_model
from trainings import (
    UNTIED,
    make_model,
    make_recipe,
    make_samples,
    make_training,
    step,
)

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.trainable import (
    adapt,
    adapter_tensors,
    choose_modules,
    choose_ranks,
    unfreeze,
    weight_shape,
)
from mlx_openelm.storage.adapter_folder import AdapterConfig, write_adapter
from mlx_openelm.storage.loading import load
from mlx_openelm.storage.tokenizer_finder import write_tokenizer
from mlx_openelm.training.arrays import trained_tensors

EMBEDDING = "transformer.token_embeddings"
TOKENS = mx.array([[1, 5, 9, 200, 7]])
IN_A_BLOCK = ["attn.out_proj", "attn.qkv_proj", "ffn.proj_1", "ffn.proj_2"]
EVEN = replace(SCALED, num_query_heads=(2, 4, 6), num_kv_heads=(1, 2, 3))


# Choice of modules ---------------------------------------------------------------


def test_all_linears_of_all_blocks_are_the_default():
    modules = choose_modules(build(UNEVEN))
    paths = [f"transformer.layers.{i}.{p}" for i in range(3) for p in IN_A_BLOCK]
    assert sorted(modules) == sorted(paths)


@pytest.mark.parametrize(
    ("num_layers", "keys", "expected"),
    [
        (1, (), [f"transformer.layers.2.{path}" for path in IN_A_BLOCK]),
        (2, ("qkv_proj",), [f"transformer.layers.{i}.attn.qkv_proj" for i in (1, 2)]),
        (1, ("ffn.proj_2",), ["transformer.layers.2.ffn.proj_2"]),
        (1, ("out_proj", EMBEDDING), ["transformer.layers.2.attn.out_proj", EMBEDDING]),
        (-1, ("lm_head",), ["lm_head"]),
    ],
)
def test_keys_are_matched_in_the_last_blocks(num_layers, keys, expected):
    modules = choose_modules(build(UNTIED), num_layers=num_layers, keys=keys)
    assert sorted(modules) == sorted(expected)


@pytest.mark.parametrize("key", ["self_attn.q_proj", "attn", "norm", "lm_head", ""])
def test_a_key_that_matches_nothing_lists_the_candidates(key):
    with pytest.raises(OpenELMError) as raised:
        choose_modules(build(UNEVEN), keys=("qkv_proj", key))
    assert repr(key) in str(raised.value)
    for candidate in [*IN_A_BLOCK, EMBEDDING]:
        assert candidate in str(raised.value)


@pytest.mark.parametrize("number", [0, 4, -2])
def test_a_wrong_number_of_layers_is_refused(number):
    with pytest.raises(OpenELMError, match="has 3 layers; use 1 to 3, or -1"):
        choose_modules(build(UNEVEN), num_layers=number)
    with pytest.raises(OpenELMError, match="has 3 layers"):
        unfreeze(build(UNEVEN), num_layers=number)


def test_the_last_layers_alone_are_trained_in_full():
    model = build(UNEVEN)
    unfreeze(model, num_layers=1)
    names = set(trained_tensors(model))
    inside = "transformer.layers.2."
    assert names == {n for n, _ in tree_flatten(model.parameters()) if inside in n}
    unfreeze(model)
    assert len(trained_tensors(model)) == len(UNEVEN.tensor_shapes())


# Choice of ranks -----------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 7, 16])
def test_ranks_by_width_have_the_same_sum_in_proportion(rank):
    modules = choose_modules(build(UNEVEN))
    ranks = choose_ranks(modules, rank, by_width=True)
    assert choose_ranks(modules, rank) == dict.fromkeys(modules, rank)
    if rank > 1:
        assert sum(ranks.values()) == rank * len(modules)
    widths = {path: sum(weight_shape(module)) for path, module in modules.items()}
    exact = rank * len(widths) / sum(widths.values())
    for path, width in widths.items():
        assert ranks[path] == pytest.approx(max(1, width * exact), abs=1)
    assert max(ranks.values()) > min(ranks.values()) or rank == 1


@pytest.mark.parametrize("by_width", [False, True])
def test_a_rank_larger_than_its_matrix_is_refused(by_width):
    modules = choose_modules(build(UNEVEN), keys=("out_proj",))
    with pytest.raises(OpenELMError, match=r"which is 64 by 32; .* 1 to 32\."):
        choose_ranks(modules, 33 if not by_width else 48, by_width=by_width)
    choose_ranks(modules, 32)


def test_ranks_of_a_quantized_model_follow_its_unpacked_widths():
    plain, packed = build(SCALED), build(SCALED)
    nn.quantize(packed, 64, 4, class_predicate=lambda p, m: isinstance(m, nn.Linear))
    shapes = [
        {path: weight_shape(module) for path, module in choose_modules(m).items()}
        for m in (plain, packed)
    ]
    assert shapes[0] == shapes[1]
    assert isinstance(next(iter(choose_modules(packed).values())), nn.QuantizedLinear)


# Initialisation ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_new_adapter_changes_no_output_and_is_trained_alone(method):
    recipe = make_recipe(fine_tune_type=method, rank="auto:4")
    model = make_model(recipe, perturb=False)
    expected = np.array(build(UNEVEN)(TOKENS))
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-5)
    leaves = {name.rpartition(".")[2] for name in trained_tensors(model)}
    assert leaves == {"lora_a", "lora_b"} | ({"m"} if method == "dora" else set())
    for name, array in trained_tensors(model).items():
        if name.endswith("lora_a"):  # Kaiming's, as mlx-lm draws it
            bound = array.shape[0] ** -0.5
            assert 0.8 * bound < mx.abs(array).max() <= bound
        elif name.endswith("lora_b"):
            assert mx.abs(array).max() == 0
    before = {n: np.array(a) for n, a in tree_flatten(model.parameters())}
    trained = set(trained_tensors(model))
    training = make_training(recipe, make_samples(), model)
    step(training), step(training)
    for name, array in tree_flatten(model.parameters()):
        assert np.array_equal(array, before[name]) == (name not in trained), name


def test_the_seed_determines_the_initial_adapter():
    def start(seed):
        return trained_tensors(make_model(make_recipe(seed=seed), perturb=False))

    first, again, other = start(0), start(0), start(1)
    for name in first:
        assert mx.array_equal(first[name], again[name])
        assert name.endswith("lora_b") or not mx.array_equal(first[name], other[name])
    drawn = [array for name, array in first.items() if name.endswith("lora_a")]
    assert len({float(array[0, 0]) for array in drawn}) == len(drawn)


def test_dora_of_an_embedding_is_refused():
    model = build(UNEVEN)
    with pytest.raises(OpenELMError, match=f"DoRA cannot adapt {EMBEDDING}; leave it"):
        adapt(model, "dora", {EMBEDDING: 4}, scale=2.0)


def test_full_training_of_a_quantized_model_is_refused():
    model = build(SCALED)
    nn.quantize(model, 64, 4, class_predicate=lambda p, m: p.endswith("1.ffn.proj_1"))
    with pytest.raises(OpenELMError, match=r"layers\.1\.ffn\.proj_1 is quantized, .*"):
        unfreeze(model)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_quantized_base_has_the_gradients_of_its_unpacked_weights(method):
    from mlx_openelm.model.lora import adapted_weight

    recipe = make_recipe(fine_tune_type=method)
    packed, plain = build(SCALED), build(SCALED)
    nn.quantize(packed, 64, 8, class_predicate=lambda p, m: isinstance(m, nn.Linear))
    linears = choose_modules(packed)
    plain.load_weights(
        [(f"{path}.weight", adapted_weight(m)) for path, m in linears.items()], False
    )
    gradients = []
    for model in (packed, plain):
        adapt(model, method, dict.fromkeys(linears, 4), scale=2.0)
        training = make_training(recipe, make_samples(), model)
        step(training)
        gradients.append(step(training))
    assert_close(*gradients)


# mlx-lm --------------------------------------------------------------------------


def assert_close(ours, theirs, limit=1e-4):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        error = np.abs(ours[name] - np.array(array)).max()
        assert error <= limit * np.abs(array).max() + 1e-9, name


def write_base(folder, config):
    write_model(folder, config, weights_of(config))
    write_tokenizer(small_tokenizer(), folder)
    return folder


@pytest.mark.interop
@pytest.mark.parametrize(
    "options",
    [
        {"fine_tune_type": "lora"},
        {"fine_tune_type": "dora", "num_layers": 2},
        {"fine_tune_type": "full"},
        {"fine_tune_type": "lora", "rank": "auto:4"},
        {"fine_tune_type": "lora", "keys": ("attn.qkv_proj", EMBEDDING)},
    ],
    ids=str,
)
def test_stock_mlx_lm_opens_a_trained_adapter(tmp_path, options):
    from mlx_lm import load as load_theirs

    base = write_base(tmp_path / "base", EVEN)
    recipe = make_recipe(**options)
    model = make_model(recipe, EVEN)
    step(make_training(recipe, make_samples(), model))
    tensors = adapter_tensors(model)
    ranks = {a.shape[1] for n, a in tensors.items() if n.endswith("lora_a")}
    assert len(ranks) <= 1  # mlx-lm's config has a single rank
    if options.get("rank") == "auto:4":
        assert ranks > {4} or max(ranks) > 4
    config = AdapterConfig(
        recipe.fine_tune_type,
        3 if recipe.num_layers == -1 else recipe.num_layers,
        recipe.keys or tuple(IN_A_BLOCK),
        max(ranks, default=0),
        recipe.scale,
    )
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", config, tensors)
    theirs, _ = load_theirs(str(base), adapter_path=str(tmp_path / "adapter"))
    again, _ = load(str(base), tmp_path / "adapter")
    expected = np.array(model(TOKENS))
    np.testing.assert_allclose(theirs(TOKENS), expected, atol=1e-4)
    np.testing.assert_allclose(again(TOKENS), expected, atol=1e-4)
    assert np.abs(expected - np.array(build(EVEN)(TOKENS))).max() > 0.01


@pytest.mark.interop
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_mlx_lms_layers_have_the_same_gradients(method):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    recipe = make_recipe(fine_tune_type=method, clip_norm=0.0)
    model, samples = make_model(recipe), make_samples()
    start = trained_tensors(model)
    training = make_training(recipe, samples, model)
    chosen = [samples[i] for i in training.order.batch(0)]

    theirs = build(UNEVEN)
    theirs.freeze()
    parameters = {"rank": 4, "scale": recipe.scale, "dropout": 0.0}
    linear_to_lora_layers(theirs, 3, parameters, use_dora=method == "dora")
    theirs.load_weights(list(start.items()), strict=False)
    assert trained_tensors(theirs).keys() == start.keys()

    def loss(model):
        total, count = mx.array(0.0), 0
        for sample in chosen:
            tokens = mx.array(sample.tokens)[None]
            losses = nn.losses.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
            total += (losses * mx.array(sample.loss_mask[1:])).sum()
            count += int(sample.loss_mask.sum())
        return total / count

    _, expected = nn.value_and_grad(theirs, loss)(theirs)
    assert_close(step(training), dict(tree_flatten(expected)))
