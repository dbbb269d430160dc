import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import GOLDEN, UNEVEN

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.layerwise_scaling import interpolate_multipliers, make_divisible

ARCH = json.loads((GOLDEN / "openelm-arch.json").read_text())
RELEASED = ("270M", "450M", "1.1B", "3B")


@pytest.mark.parametrize("size", RELEASED)
def test_released_sizes_match_apples(size):
    expected, config = ARCH[size], OpenELMConfig.preset(size)
    assert config.num_query_heads == tuple(expected["num_query_heads"])
    assert config.num_kv_heads == tuple(expected["num_kv_heads"])
    assert config.ffn_dims == tuple(expected["ffn_dims"])
    assert config.num_parameters == expected["params_hf_32000"]
    padded = OpenELMConfig.preset(size, vocab_size=32128)
    assert padded.num_parameters == expected["params_corenet_32128"]
    assert len(padded.tensor_shapes()) == expected["tensors"]
    assert config.max_context_length == expected["max_context_length"]
    assert config.rope_freq_constant == expected["rope_freq_constant"]
    assert config.rms_norm_eps == expected["rms_norm_eps"]
    published = interpolate_multipliers((0.5, 4.0), config.num_transformer_layers)
    assert published == expected["ffn_multipliers"]


def test_gpt_test_matches_corenets():
    config = OpenELMConfig.preset("gpt-test", vocab_size=32128)
    assert config.num_parameters == ARCH["gpt-test"]["params_corenet_32128"]
    assert config.ffn_dims == tuple(ARCH["gpt-test"]["ffn_dims"])


@pytest.mark.parametrize("size", ["gpt-test", *RELEASED])
@pytest.mark.parametrize("rows", [32000, 32128])
def test_the_config_is_inferred_from_shapes(size, rows):
    config = OpenELMConfig.preset(size, vocab_size=rows)
    assert OpenELMConfig.from_shapes(config.tensor_shapes()) == config


def test_the_config_is_inferred_from_uneven_shapes():
    inferred = OpenELMConfig.from_shapes(UNEVEN.tensor_shapes())
    assert replace(inferred, max_context_length=64) == UNEVEN
    untied = replace(UNEVEN, share_input_output_layers=False)
    assert not OpenELMConfig.from_shapes(
        untied.tensor_shapes()
    ).share_input_output_layers


@pytest.mark.parametrize("size", ["gpt-test", *RELEASED])
def test_a_written_config_is_read_again(size):
    config = OpenELMConfig.preset(size)
    assert OpenELMConfig.from_dict(config.to_dict()) == config
    if size in RELEASED:
        assert config.to_dict()["ffn_multipliers"] == ARCH[size]["ffn_multipliers"]


sizes = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 700)),
    min_size=1,
    max_size=6,
)


@given(sizes, st.sampled_from([32, 64, 96, 250]), st.booleans())
def test_any_lists_are_preserved_for_us_and_for_mlx_lm(layers, model_dim, tied):
    config = OpenELMConfig(
        model_dim=model_dim,
        head_dim=16,
        num_query_heads=tuple(k * g for k, g, _ in layers),
        num_kv_heads=tuple(k for k, _, _ in layers),
        ffn_dims=tuple(f for *_, f in layers),
        share_input_output_layers=tied,
    )
    written = config.to_dict()
    assert OpenELMConfig.from_dict(json.loads(json.dumps(written))) == config
    del written["ffn_dims"]  # mlx-lm and Hugging Face read only multipliers
    assert OpenELMConfig.from_dict(written) == config
    for multiplier, width in zip(
        written["ffn_multipliers"], config.ffn_dims, strict=True
    ):
        assert (
            make_divisible(multiplier * model_dim, written["ffn_dim_divisor"]) == width
        )


@given(st.floats(1, 1e5), st.sampled_from([1, 8, 64, 256]))
def test_make_divisible_never_loses_a_tenth(value, divisor):
    rounded = make_divisible(value, divisor)
    assert rounded % divisor == 0
    assert rounded >= 0.9 * value
    assert abs(rounded - value) <= max(divisor, 0.1 * value)


def test_hugging_faces_published_config_is_read():
    sizes = ARCH["270M"]
    published = {
        "model_type": "openelm",
        "activation_fn_name": "swish",
        "ffn_dim_divisor": 256,
        "ffn_multipliers": sizes["ffn_multipliers"],
        "ffn_with_glu": True,
        "head_dim": 64,
        "max_context_length": 2048,
        "model_dim": 1280,
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": True,
        "num_gqa_groups": 4,
        "num_kv_heads": sizes["num_kv_heads"],
        "num_query_heads": sizes["num_query_heads"],
        "num_transformer_layers": 16,
        "qkv_multipliers": [0.5, 1.0],
        "rope_freq_constant": 10000,
        "share_input_output_layers": True,
        "vocab_size": 32000,
    }
    assert OpenELMConfig.from_dict(published) == OpenELMConfig.preset("270M")


def test_apples_mlx_config_is_read():
    config = OpenELMConfig.from_dict(
        {"model_name": "OpenELM-1_1B", "vocab_size": 32128, "max_context_length": 2048}
    )
    assert config == OpenELMConfig.preset("1.1B", vocab_size=32128)


@pytest.mark.parametrize("nested", [True, False])
def test_a_corenet_config_is_read(nested):
    flat = {
        "model.language_modeling.name": "general_gpt",
        "model.language_modeling.general_gpt.model_name": "OpenELM-450M",
        "model.language_modeling.general_gpt.vocab_size": 32000,
        "model.language_modeling.general_gpt.padding_index": 32000,
        "model.language_modeling.general_gpt.max_context_length": 1024,
    }
    tree: dict = {}
    for key, value in flat.items():
        *groups, leaf = key.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[leaf] = value
    config = OpenELMConfig.from_dict(tree if nested else flat)
    expected = OpenELMConfig.preset("450M", vocab_size=32128)
    assert config == replace(expected, max_context_length=1024)


def test_explicit_lists_override_the_multipliers():
    written = OpenELMConfig.preset("270M").to_dict()
    written |= {"num_query_heads": [4] * 16, "num_kv_heads": [2] * 16}
    config = OpenELMConfig.from_dict(written)
    assert config.num_query_heads == (4,) * 16
    assert config.num_kv_heads == (2,) * 16
    assert config.ffn_dims == OpenELMConfig.preset("270M").ffn_dims


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"ffn_with_glu": False}, "ffn_with_glu"),
        ({"num_query_heads": [12] * 15}, "num_query_heads"),
        ({"num_query_heads": [13] * 16}, "query heads"),
        ({"head_dim": 63}, "63"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"model_dim": "wide"}, "config"),
        ({"num_transformer_layers": 3}, "There are 16"),
    ],
)
def test_a_config_of_another_model_is_refused(change, message):
    with pytest.raises(OpenELMError, match=message):
        OpenELMConfig.from_dict(OpenELMConfig.preset("270M").to_dict() | change)


def test_foreign_shapes_are_refused_with_their_names():
    with pytest.raises(OpenELMError, match=r"model\.embed_tokens"):
        OpenELMConfig.from_shapes({"model.embed_tokens.weight": (10, 4)})


def test_size_names():
    assert (
        OpenELMConfig.preset("apple/OpenELM-1_1B-Instruct").size_name == "OpenELM-1_1B"
    )
    assert UNEVEN.size_name == "OpenELM"
    with pytest.raises(OpenELMError, match="270M, 450M"):
        OpenELMConfig.preset("7B")
