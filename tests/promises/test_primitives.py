"""What a GPU evaluates: few primitives for a token, and only what it implements."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from graphs import count_compiled, fused_operations, primitives_of, work_of
from models import EVEN, build
from trainings import (
    make_model,
    make_pairs,
    make_recipe,
    make_samples,
    make_training,
    traced_update,
)

from mlx_openelm.device import FORCED_PATH
from mlx_openelm.generation.cache import KVCache, SlotCache
from mlx_openelm.generation.compact_caches import QuantizedKVCache, SlidingKVCache
from mlx_openelm.generation.decoding import Sampler
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.step import (
    compiled_batch_step,
    compiled_step,
    plain_batch_step,
    plain_step,
)
from mlx_openelm.model.likelihood import log_likelihoods
from mlx_openelm.model.packed_weights import pack_weight, unpack_weight
from mlx_openelm.model.quantization import Packing
from mlx_openelm.training.arrays import flatten, trained_tensors

# Without an implementation in MLX's Metal back end (its metal/primitives.cpp).
CPU_ONLY = {"QRF", "SVD", "Inverse", "Cholesky", "Eig", "Eigh", "LUF"}
WIDE = {mx.float64, mx.complex64}
LONG = {mx.int64, mx.uint64}


@pytest.fixture(autouse=True)
def path_of_a_gpu(monkeypatch):
    monkeypatch.setenv(FORCED_PATH, "1")
    with fused_operations():
        yield


def make_config(layers):
    return replace(
        EVEN,
        num_query_heads=(4,) * layers,
        num_kv_heads=(2,) * layers,
        ffn_dims=(128,) * layers,
    )


def make(layers, *, bits=None):
    model = build(make_config(layers))
    model.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(model, 64, bits)
    model.eval()
    mx.eval(model.parameters())
    return model


def decoded(model, make_step=plain_step, make_cache=KVCache):
    """Return the primitives of a decode step, with those of its sampler."""
    cache = [make_cache() for _ in model.layers]
    step = make_step(model)
    model(mx.array([[1, 5, 7]]), cache)
    step(mx.array([4]), cache)  # joins the weights of the head norms
    mx.eval([layer.state for layer in cache])
    # The first use of a step that is compiled traces it, in the graph that is exported.
    step = make_step(model)
    options = Sampling(temp=0.7, top_p=0.9, repetition_penalty=1.2, logprobs=2)
    sampler = Sampler(options, [1, 5, 7], 64, 2)
    mx.eval(mx.random.state)  # else its history is part of the graph

    def run(token):
        logits = step(token, cache)
        return sampler.draw(logits).arrays

    return primitives_of(run, mx.array([4]))


def decoded_in_batch(model, make_step=plain_batch_step):
    cache = [SlotCache() for _ in model.layers]
    for layer in cache:
        heads = mx.zeros((1, 2, 5, 32), mx.bfloat16)
        layer.put(0, heads, heads)
        layer.put(1, heads, heads)
        layer.rows, layer.offset, layer.reach = mx.arange(2), mx.array([5, 5]), 32
    mx.eval([layer.state for layer in cache])
    make_step(model)(mx.array([4, 9]), cache)
    mx.eval([layer.state for layer in cache])
    step = make_step(model)
    return primitives_of(lambda tokens: step(tokens, cache), mx.array([4, 9]))


def per_layer(count, **options):
    return work_of(count(make(3, **options))) - work_of(count(make(2, **options)))


@pytest.mark.parametrize("make_step", [plain_step, compiled_step])
@pytest.mark.parametrize(("bits", "expected"), [(None, 11), (4, 13)])
def test_a_token_takes_few_primitives_in_each_layer(make_step, bits, expected):
    """Norm, qkv, head norm, RoPE, cache, attention, out; norm and 3 of the FFN.

    A sum with the residual stream is part of a product, unless the weights are packed.
    """
    count = per_layer(lambda model: decoded(model, make_step), bits=bits)
    assert count == expected


@pytest.mark.parametrize(("bits", "expected"), [(None, 11), (4, 13)])
def test_a_step_of_a_batch_takes_few_primitives_in_each_layer(bits, expected):
    count = per_layer(lambda m: decoded_in_batch(m, compiled_batch_step), bits=bits)
    assert count == expected


def test_an_update_takes_few_primitives_in_each_layer():
    """In products 32, in AdamW 8, in the gradient's norm 8, in the rest 29."""
    recipe = make_recipe(rank=8, grad_accumulation_steps=1)
    samples, counts = make_samples([20, 30, 25, 28]), []
    mx.enable_compile()  # the graph is not evaluated, so no compiler is called
    try:
        for layers in (2, 3):
            model = make_model(recipe, make_config(layers))
            training = make_training(recipe, samples, model)
            counts.append(count_compiled(*traced_update(training, samples)))
    finally:
        mx.disable_compile()
    assert counts[1] - counts[0] == 77


# Audit ---------------------------------------------------------------------------


def training_graph(**options):
    """Return the primitives of one compiled update."""
    recipe = make_recipe(grad_accumulation_steps=1, **options)
    samples = make_pairs(6) if recipe.objective == "dpo" else make_samples()
    training = make_training(recipe, samples, make_model(recipe))
    step, optimizer = training.trainer._step, training.context.state.optimizer
    batch = step._objective.pad(samples[:3])
    trees = trained_tensors(training.model), flatten(optimizer.state), batch.arrays
    arrays = [{**tree} for tree in trees]
    names = [(i, name) for i, tree in enumerate(arrays) for name in tree]

    def update(*values):
        given = [{}, {}, {}]
        for (i, name), value in zip(names, values, strict=True):
            given[i][name] = value
        updated, state, sums, report = step._update_from_batch(
            *given, [], mx.array(9.0), mx.array(1e-3)
        )
        return [*updated.values(), *state.values(), sums, report]

    return primitives_of(update, *(arrays[i][name] for i, name in names))


def scored(model):
    tokens = mx.array([[1, 4, 6, 8]])
    return primitives_of(lambda t: log_likelihoods_lazily(model, t), tokens)


def log_likelihoods_lazily(model, tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "eval", lambda *arrays: None)
        return log_likelihoods(model, tokens[:, :-1], tokens[:, 1:])


def converted(bits, mode="affine"):
    packing = Packing(bits, 64)

    def pack_and_unpack(weight):
        return unpack_weight(packing, pack_weight(packing, weight), mx.float32)

    return primitives_of(pack_and_unpack, mx.random.normal((64, 128)))


GRAPHS = {
    "generate": lambda: decoded(make(2)),
    "generate, compiled": lambda: decoded(make(2), compiled_step),
    "generate, 4 bits": lambda: decoded(make(2, bits=4)),
    "generate, quantized cache": lambda: decoded(
        make(2), make_cache=lambda: QuantizedKVCache(8, 32)
    ),
    "generate, sliding cache": lambda: decoded(
        make(2), make_cache=lambda: SlidingKVCache(16)
    ),
    "serve": lambda: decoded_in_batch(make(2)),
    "serve, compiled": lambda: decoded_in_batch(make(2), compiled_batch_step),
    "lora": training_graph,
    "lora, dora": lambda: training_graph(fine_tune_type="dora"),
    "lora, full with z-loss": lambda: training_graph(
        fine_tune_type="full", z_loss=0.01, weight_decay=0.1
    ),
    "lora, dpo": lambda: training_graph(objective="dpo"),
    **{
        f"lora, {name}": lambda name=name: training_graph(optimizer=name)
        for name in ("sgd", "lion", "adafactor", "muon")
    },
    "evaluate": lambda: scored(make(2)),
    "convert": lambda: converted(4),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_gpu_implements_every_primitive(name):
    graph = GRAPHS[name]()
    assert sum(bool(primitive.dtypes) for primitive in graph) > 3
    assert not {p.name for p in graph} & CPU_ONLY
    assert not any(p.dtypes & WIDE for p in graph)
    allowed = set()
    if name == "serve":  # MLX's indices of an assignment
        allowed = {"AsType", "Scatter"}
    elif name.startswith("lora"):  # the steps that MLX's optimizers count
        allowed = {"Add", "AsType", "Select"}
        assert sum(bool(p.dtypes & LONG) for p in graph) <= 8
    assert {p.name for p in graph if p.dtypes & LONG} <= allowed
