"""Stock mlx-lm opens every cell of the table in docs/interop.md."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from tool_matrix import (
    BITS,
    KINDS,
    RELEASED,
    make_adapter,
    make_demo,
    make_zeros,
)

import mlx_openelm
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.text.templates import Turn, encode_turns

pytestmark = [pytest.mark.interop, pytest.mark.proof]

TOKENS = mx.array([[1, 5, 90, 2000, 7, 42, 4000, 3]])


def in_float32(array: mx.array) -> mx.array:
    floating = mx.issubdtype(array.dtype, mx.floating)
    return array.astype(mx.float32) if floating else array


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_the_demo_has_our_logits(tmp_path: Path, bits: str, kind: str) -> None:
    import mlx_lm

    folder = make_demo(tmp_path, kind, **BITS[bits])
    stored = open_folder(folder)
    assert len({*stored.packings.values()}) == {"16 bits": 0, "4 bits": 1}.get(bits, 2)
    adapter = None
    if kind == "adapter":
        adapter = str(make_adapter(tmp_path / "lora", stored.config, folder))
    ours, tokenizer = mlx_openelm.load(str(folder), adapter)
    theirs, their_tokenizer = mlx_lm.load(str(folder), adapter_path=adapter)
    theirs.update(tree_map(in_float32, theirs.parameters()))
    logits = np.array(theirs(TOKENS))
    np.testing.assert_allclose(logits, np.array(ours(TOKENS)), atol=1e-4)
    if adapter is not None:
        plain, _ = mlx_openelm.load(str(folder))
        assert np.abs(logits - np.array(plain(TOKENS))).max() > 0.1
    assert their_tokenizer.has_chat_template == (kind == "instruct")
    if kind == "instruct":
        message = {"role": "user", "content": "Who was the king? "}
        ids = their_tokenizer.apply_chat_template([message], add_generation_prompt=True)
        turns = [Turn("user", message["content"])]
        assert ids == encode_turns(tokenizer, turns, "instruct")[0]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", RELEASED)
def test_the_released_shapes_load(
    tmp_path: Path, name: str, bits: str, adapted: bool
) -> None:
    """Names, shapes and packings of all tensors; the weights are not read."""
    from mlx_lm.utils import load_adapters, load_model

    config = OpenELMConfig.preset(name)
    folder = make_zeros(tmp_path / "model", config, bits)
    stored = open_folder(folder)  # as ours reads it
    model, _ = load_model(folder, lazy=True)
    loaded = {n: a.shape for n, a in tree_flatten(model.parameters())}
    assert loaded == {n: tensor.shape for n, tensor in stored.tensors.items()}
    if adapted:
        adapter = make_adapter(tmp_path / "lora", config, folder)
        load_adapters(model, str(adapter))
        factors = [n for n, _ in tree_flatten(model.trainable_parameters())]
        count = 4 * config.num_transformer_layers
        assert sum(name.endswith("lora_b") for name in factors) == count
