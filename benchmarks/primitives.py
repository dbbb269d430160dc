"""Primitives that a GPU evaluates, ours and mlx-lm's, counted in the graphs.

    python benchmarks/primitives.py

For one token, and one update of LoRA. No GPU is needed: a single primitive stands in
for each of MLX's fused operations, and views (reshape, transpose, slices, ...) do not
count. An update is counted as `mx.compile` fuses it, and each array that is copied into
a concatenation as one primitive, in both programs.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ["MLX_OPENELM_GPU_PATH"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))

from graphs import count_compiled, fused_operations, primitives_of, work_of
from models import EVEN, build, weights_of
from trainings import (
    make_model,
    make_recipe,
    make_samples,
    make_training,
    traced_update,
)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.generation.cache import KVCache
from mlx_openelm.generation.step import plain_step
from mlx_openelm.tensor_names import to_folder
from mlx_openelm.training.arrays import flatten


def config(layers: int) -> OpenELMConfig:
    sizes = {"num_query_heads": 4, "num_kv_heads": 2, "ffn_dims": 128}
    return replace(EVEN, **{name: (size,) * layers for name, size in sizes.items()})


def their_model(layers: int) -> nn.Module:
    from mlx_lm.models.openelm import Model, ModelArgs

    model = Model(ModelArgs.from_dict({**config(layers).to_dict()}))
    weights = weights_of(config(layers))
    model.load_weights([(to_folder(n), mx.array(w)) for n, w in weights.items()])
    return model


def token(layers: int, model: nn.Module, step: Callable, cache: list) -> int:
    if layers:
        model.eval()
        mx.eval(model(mx.array([[1, 5, 7]]), cache))
        mx.eval(step(mx.array([4])))
    return work_of(primitives_of(step, mx.array([4])))


def our_token(layers: int, bits: int | None) -> int:
    model = build(config(layers))
    if bits:
        nn.quantize(model, 64, bits)
    cache, step = [KVCache() for _ in model.layers], plain_step(model)
    return token(layers, model, lambda t: step(t, cache), cache)


def their_token(layers: int, bits: int | None) -> int:
    from mlx_lm.models.cache import make_prompt_cache

    model = their_model(layers)
    if bits:
        nn.quantize(model, 64, bits)
    cache = make_prompt_cache(model)
    return token(layers, model, lambda t: model(t[None], cache)[0, -1], cache)


def our_update(layers: int) -> int:
    recipe = make_recipe(rank=8, grad_accumulation_steps=1)
    samples = make_samples([20, 30, 25, 28])
    training = make_training(recipe, samples, make_model(recipe, config(layers)))
    return count_compiled(*traced_update(training, samples))


def their_update(layers: int) -> int:
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = their_model(layers)
    model.freeze()
    linear_to_lora_layers(model, layers, {"rank": 8, "scale": 2.0, "dropout": 0.0})
    optimizer = optim.AdamW(1e-3)
    optimizer.init(model.trainable_parameters())
    batch = mx.zeros((4, 32), mx.int32)
    lengths = mx.array([[0, 20], [0, 30], [0, 25], [0, 28]])

    def graph(weights, state, rate, batch, lengths) -> list[mx.array]:
        model.update(tree_unflatten(list(weights.items())))
        optimizer.state = tree_map_with_path(lambda p, _: state[p], optimizer.state)
        optimizer.learning_rate = rate
        loss = nn.value_and_grad(model, default_loss)
        (value, count), gradients = loss(model, batch, lengths)
        optimizer.update(model, gradients)
        trees = model.trainable_parameters(), optimizer.state
        return [value, count, *(a for tree in trees for _, a in tree_flatten(tree))]

    trees = flatten(model.trainable_parameters()), flatten(optimizer.state)
    return count_compiled(graph, *trees, mx.array(1e-3), batch, lengths)


def main() -> None:
    import mlx_lm.models.openelm

    mlx_lm.models.openelm.swiglu = mx.add  # compiled there: one primitive
    with fused_operations():
        for bits in (None, 4):
            ours = our_token(3, bits) - our_token(2, bits)
            theirs = their_token(3, bits) - their_token(2, bits)
            print(
                f"a token, each layer, {bits or 16} bits: ours {ours}, mlx-lm {theirs}"
            )
        ours, theirs = (f(3) - f(2) for f in (our_update, their_update))
    print(f"an update of LoRA, each layer: ours {ours}, mlx-lm {theirs}")


if __name__ == "__main__":
    main()
