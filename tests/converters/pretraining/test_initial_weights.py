"""The weights that pre-training starts from, as trainers store them."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from commands import call
from models import TEXT, UNEVEN, small_tokenizer, weights_of
from pretrainings import small_recipe

from converters.formats.sources import open_source
from converters.pretraining.plan import plan_pretraining
from converters.pretraining.recipe import ModelRecipe, TokenizerRecipe
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.shards import write_json
from mlx_openelm.tensor_names import EMBEDDING, HEAD

torch = pytest.importorskip("torch", reason="pre-training runs in PyTorch")

from converters.pretraining.checkpoints import AVERAGE  # noqa: E402 - needs torch
from converters.pretraining.initial_weights import read_initial  # noqa: E402
from converters.pretraining.run import pretrain  # noqa: E402

WEIGHTS = weights_of(UNEVEN)


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model", None])
def test_wrapped_weights_with_buffers_and_a_copied_head_are_read(tmp_path, key):
    state = {f"_orig_mod.{name}": torch.from_numpy(w) for name, w in WEIGHTS.items()}
    state["_orig_mod.causal_mask"] = torch.ones(4, 4, dtype=torch.bool)
    state[f"_orig_mod.{HEAD}"] = torch.from_numpy(WEIGHTS[EMBEDDING])
    torch.save({key: state, "epoch": 1} if key else state, tmp_path / "a.pt")
    write_json(tmp_path / "config.json", UNEVEN.to_dict())
    initial = read_initial(str(tmp_path / "a.pt"))
    assert initial.config == UNEVEN
    assert initial.weights.keys() == WEIGHTS.keys()
    for name, weight in initial.weights.items():
        np.testing.assert_array_equal(weight, WEIGHTS[name])


# Without a config.json -----------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    """A recipe for the weights of `save`: a published shape, with padding rows."""
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(small_tokenizer().model_proto)
    recipe = small_recipe(tmp_path)
    return replace(
        recipe,
        tokenizer=TokenizerRecipe(path=str(tokenizer)),
        data=replace(recipe.data, heldout=()),
        model=replace(recipe.model, spare_rows=True),
        optimizer=replace(recipe.optimizer, warmup_learning_rate=0.0),
        steps=1,  # with learning rate 0
    )


def sizes_of(recipe):
    return recipe.model.build(300)


def save(kind: str, folder, config) -> str:
    """Write random weights in one of the forms that `convert` reads."""
    weights = weights_of(config)
    tensors = {name: torch.from_numpy(w) for name, w in weights.items()}
    folder.mkdir()
    if kind == "checkpoint_average.pt":
        torch.save(tensors, folder / kind)
        return str(folder / kind)
    torch.save(tensors, folder / "a.pt")
    target = folder / "converted"
    options = {
        "mlx": ("--dtype", "float32"),
        "hf": ("--to", "hf", "--dtype", "float32"),
        "4 bits": ("-q", "--no-receipt", "--q-group-size", "32"),
    }[kind]
    command = ("convert", folder / "a.pt", "--mlx-path", target, "--tokenizer", "none")
    result = call(*map(str, command), *options)
    assert result.exit_code == 0, result.stderr
    return str(target)


@pytest.mark.parametrize("kind", ["checkpoint_average.pt", "mlx", "hf", "4 bits"])
@pytest.mark.parametrize("with_model", [True, False])
def test_whatever_convert_reads_starts_a_run(recipe, tmp_path, kind, with_model):
    config = sizes_of(recipe)
    if kind == "4 bits":  # groups of 32
        model = replace(recipe.model, model_dim=64, head_dim=32, ffn_dim_divisor=32)
        recipe = replace(recipe, model=model)
        config = sizes_of(recipe)
    init = save(kind, tmp_path / "weights", config)
    if not with_model:  # then the context has 2048 tokens
        Path(recipe.data.train[0]).write_text(TEXT * 8)
        recipe = replace(recipe, model=ModelRecipe())
    recipe = replace(recipe, init=init)
    pretrain(recipe)
    written = torch.load(Path(recipe.output) / AVERAGE)
    expected = open_source(init)
    assert written.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(
            written[name], np.array(tensor.read().astype(mx.float32))
        )
    assert len(written[EMBEDDING]) == 384  # with the padding rows of the weights
    result = OpenELMConfig.from_file(Path(recipe.output) / "config.json")
    assert result.max_context_length == (32 if with_model else 2048)


def test_a_model_that_does_not_agree_is_refused(recipe, tmp_path):
    init = save("checkpoint_average.pt", tmp_path / "weights", sizes_of(recipe))
    model = replace(recipe.model, num_layers=3)
    message = r"layers\.1\.\S+ has shape \(160, 32\) in the recipe and \(256, 32\) in"
    with pytest.raises(OpenELMError, match=message):
        pretrain(replace(recipe, init=init, model=model))


def test_a_dry_run_takes_the_sizes_of_bare_weights(recipe, tmp_path):
    init = save("checkpoint_average.pt", tmp_path / "weights", sizes_of(recipe))
    plan = plan_pretraining(replace(recipe, init=init, model=ModelRecipe()))
    assert plan.config.num_parameters == sizes_of(recipe).num_parameters
    assert not plan.missing
